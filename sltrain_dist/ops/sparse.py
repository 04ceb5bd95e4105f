"""S applied to activations, and the sampled product that gives its gradient: operators and reference.

    y += x S^T        dx += dy S        dvalues = (dy^T x) at the support

The CPU kernels (csrc/cpu) turn a few tokens at a time into feature-major order inside the cache, where
one entry of S meets contiguous tokens. The reference makes S dense, a panel of rows at a time.

Shapes: n tokens, out and in features; values, offsets and tiles as in ops.tiles.
"""

import torch
from torch import Tensor

from sltrain_dist.ops.support import add_support, gather_support
from sltrain_dist.ops.tiles import Tiles


def _row_panels(values: Tensor, offsets: Tensor, tiles: Tiles) -> list[tuple[slice, slice]]:
    """(rows of S, the tile rows of values and offsets that hold them); one panel for a flat support."""
    if tiles.is_whole(values):
        return [(slice(0, tiles.tile_out), slice(None))]
    out = values.shape[0] * tiles.tile_out
    rows = tiles.panel_rows(out)
    return [
        (slice(start, min(start + rows, out)), slice(start // tiles.tile_out, (start + rows) // tiles.tile_out))
        for start in range(0, out, rows)
    ]  # fmt: skip


@torch.library.custom_op("sltrain_dist::sparse_forward", mutates_args=("y",))
def sparse_forward(
    x: Tensor,
    y: Tensor,
    values: Tensor,
    offsets: Tensor,
    tile_out: int,
    tile_in: int,
    block: int,
) -> None:
    """y += x S^T in place.

    Args:
        x: [n, in]; y: [n, out]; values as in ops.tiles; all of one dtype. Sums in at least float32.
    """
    tiles = Tiles(tile_out, tile_in, block)
    for rows, part in _row_panels(values, offsets, tiles):
        s = x.new_zeros(rows.stop - rows.start, x.shape[1])
        add_support(s, values[part], offsets[part], tile_out, tile_in, block)
        y[:, rows] += x @ s.t()


sparse_forward.register_fake(lambda *_: None)


@torch.library.custom_op("sltrain_dist::sparse_backward", mutates_args=("dx",))
def sparse_backward(
    dy: Tensor,
    x: Tensor,
    dx: Tensor | None,
    values: Tensor,
    offsets: Tensor,
    tile_out: int,
    tile_in: int,
    block: int,
    need_values: bool,
) -> Tensor:
    """dx += dy S in place (where given), and dvalues = (dy^T x) at the support.

    Args:
        dy: [n, out]; x, dx: [n, in]; values as in ops.tiles; all of one dtype.

    Returns:
        dvalues in the shape and dtype of ``values``, summed in at least float32; empty unless ``need_values``.
    """
    tiles = Tiles(tile_out, tile_in, block)
    dvalues = torch.zeros_like(values) if need_values else values.new_empty(0)
    for rows, part in _row_panels(values, offsets, tiles):
        if dx is not None:
            s = x.new_zeros(rows.stop - rows.start, x.shape[1])
            add_support(s, values[part], offsets[part], tile_out, tile_in, block)
            dx += dy[:, rows] @ s
        if need_values:
            dw = dy[:, rows].t() @ x
            gather_support(dw, rows.start, dvalues, offsets, tile_out, tile_in, block)
    return dvalues


@sparse_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    dx: Tensor | None,
    values: Tensor,
    offsets: Tensor,
    tile_out: int,
    tile_in: int,
    block: int,
    need_values: bool,
) -> Tensor:
    return torch.empty_like(values) if need_values else values.new_empty(0)
