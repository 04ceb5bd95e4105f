"""The layout of a sparse matrix in equal tiles, as views of a dense one.

S [out, in] is cut into tiles of ``tile_out x tile_in``. Every tile holds exactly k blocks of
``block x block``; ``offsets`` say which of the tile's positions they take:

    values   [out/tile_out, in/tile_in, k, block*block]
    offsets  [out/tile_out, in/tile_in, k]               (flat [k] where the one tile is the matrix)

A tile is one block tall (positions count along dim 1), one block wide (along dim 0), or, with
1 x 1 blocks, the whole matrix (positions count row-major).

Shapes: N tile rows, C tile columns, P positions in a tile, K blocks in a tile.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Sizes of a tile and of the blocks in it, in matrix elements."""

    tile_out: int
    tile_in: int
    block: int

    def view(self, panel: Tensor) -> Tensor:
        """View rows of a dense matrix [rows, in] as its tiles' positions, [N, C, P, block, block].

        ``rows`` is a multiple of tile_out. Writing into the view writes into the panel.
        """
        rows, columns = panel.shape
        n, c, b = rows // self.tile_out, columns // self.tile_in, self.block
        if self.tile_out == b:
            return panel.view(n, b, c, self.tile_in // b, b).permute(0, 2, 3, 1, 4)
        if self.tile_in == b:
            return panel.view(n, self.tile_out // b, b, c, b).permute(0, 3, 1, 2, 4)
        return panel.view(1, 1, rows * columns, 1, 1)

    def index(self, offsets: Tensor) -> Tensor:
        """Offsets [N, C, K] as an index into dim 2 of ``view``, [N, C, K, block, block] (expanded, int64)."""
        index = offsets.long()[..., None, None]
        return index.expand(*offsets.shape, self.block, self.block)

    def blocks(self, values: Tensor) -> Tensor:
        """Values [N, C, K, block*block] as [N, C, K, block, block]."""
        return values.view(*values.shape[:-1], self.block, self.block)

    def is_whole(self, values: Tensor) -> bool:
        """Whether the matrix is one tile, whose values are stored flat, [K]."""
        return values.dim() == 1

    def panel_rows(self, out_features: int) -> int:
        """Rows of dW held at a time: max(256, out/8), in whole tiles."""
        rows = max(256, -(-out_features // 8))
        return max(self.tile_out, rows // self.tile_out * self.tile_out)


def add_support(w: Tensor, values: Tensor, offsets: Tensor, tiles: Tiles) -> None:
    """Write S into the zero matrix ``w`` [out, in] in place. Positions are unique, so nothing is summed."""
    if tiles.is_whole(values):
        w.view(-1).scatter_(0, offsets.long(), values)
        return
    rows = tiles.panel_rows(w.shape[0])
    for start in range(0, w.shape[0], rows):
        panel = tiles.view(w[start : start + rows])
        part = slice(start // tiles.tile_out, start // tiles.tile_out + panel.shape[0])
        panel.scatter_(2, tiles.index(offsets[part]), tiles.blocks(values[part]))


def gather_support(
    panel: Tensor, start: int, dvalues: Tensor, offsets: Tensor, tiles: Tiles
) -> None:
    """Read a panel of dW (rows ``start`` and on) at the support, into ``dvalues`` in place."""
    if offsets.dim() == 1:
        # The flat support is not cut by rows: its boundaries live on the device, and reading them would sync.
        position = offsets.long() - start * panel.shape[1]
        inside = (position >= 0) & (position < panel.numel())
        found = panel.reshape(-1)[position.clamp_(0, panel.numel() - 1)]
        dvalues.copy_(found.where(inside, dvalues))
        return
    view = tiles.view(panel)
    part = slice(start // tiles.tile_out, start // tiles.tile_out + view.shape[0])
    found = view.gather(2, tiles.index(offsets[part]))
    dvalues[part] = found.reshape(dvalues[part].shape)
