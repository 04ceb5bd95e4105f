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
        """Rows of dW held at a time: max(256, out/8), in whole tiles; a tile that is the matrix may be cut."""
        rows = max(256, -(-out_features // 8))
        if self.block not in (self.tile_out, self.tile_in):
            return rows
        return max(self.tile_out, rows // self.tile_out * self.tile_out)


def matrix_shape(values: Tensor, tiles: Tiles) -> tuple[int, int]:
    """The [out, in] of the matrix whose support these values belong to."""
    if tiles.is_whole(values):
        return tiles.tile_out, tiles.tile_in
    return values.shape[0] * tiles.tile_out, values.shape[1] * tiles.tile_in
