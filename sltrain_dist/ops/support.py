"""Writing S into a dense matrix and reading a dense matrix at its support: operators and reference.

Compiled kernels (csrc/) implement the same schemas for their device; the functions here are what runs
without them. They hold an int64 index of one panel of rows at a time, the kernels hold none.

Shapes: see ops.tiles.
"""

import torch
from torch import Tensor

from sltrain_dist.ops import kernels
from sltrain_dist.ops.tiles import Tiles

kernels.load()


@torch.library.custom_op("sltrain_dist::add_support", mutates_args=("w",))
def add_support(
    w: Tensor, values: Tensor, offsets: Tensor, tile_out: int, tile_in: int, block: int
) -> None:
    """W += S in place, added in at least float32 and rounded once. Positions are unique.

    Args:
        w: [out, in], contiguous.
        values: [out/tile_out, in/tile_in, k, block*block], or [k] where the tile is the matrix; dtype of w.
        offsets: [out/tile_out, in/tile_in, k] or [k]; uint8, int32 or int64.
        tile_out, tile_in, block: see ops.tiles.
    """
    tiles = Tiles(tile_out, tile_in, block)
    if tiles.is_whole(values):
        w.view(-1).scatter_add_(0, offsets.long(), values)
        return
    rows = tiles.panel_rows(w.shape[0])
    for start in range(0, w.shape[0], rows):
        panel = tiles.view(w[start : start + rows])
        part = slice(start // tile_out, start // tile_out + panel.shape[0])
        panel.scatter_add_(2, tiles.index(offsets[part]), tiles.blocks(values[part]))


add_support.register_fake(lambda *_: None)


@torch.library.custom_op("sltrain_dist::gather_support", mutates_args=("dvalues",))
def gather_support(
    panel: Tensor,
    start: int,
    dvalues: Tensor,
    offsets: Tensor,
    tile_out: int,
    tile_in: int,
    block: int,
) -> None:
    """Read rows ``start`` and on of dW, [rows, in] contiguous, at the support, into ``dvalues`` in place.

    ``rows`` is a multiple of tile_out, except where the tile is the matrix: then any.
    """
    tiles = Tiles(tile_out, tile_in, block)
    if tiles.is_whole(dvalues):
        # The flat support is not cut by rows: its boundaries live on the device, and reading them would sync.
        position = offsets.long() - start * panel.shape[1]
        inside = (position >= 0) & (position < panel.numel())
        found = panel.reshape(-1)[position.clamp_(0, panel.numel() - 1)]
        dvalues.copy_(found.where(inside, dvalues))
        return
    view = tiles.view(panel)
    part = slice(start // tile_out, start // tile_out + view.shape[0])
    found = view.gather(2, tiles.index(offsets[part]))
    dvalues[part] = found.reshape(dvalues[part].shape)


gather_support.register_fake(lambda *_: None)
