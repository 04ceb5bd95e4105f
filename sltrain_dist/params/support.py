"""Where the entries of S are: a pure function of (seed, layer name, global tile coordinate).

No generator state takes part, so every world size, tensor-parallel degree and resume sees the same
pattern, and a rank computes only the tiles it holds. Three kinds share one layout (ops.tiles):

    fan_in    tile 1 x w       every output row gets k random inputs in each window of w <= 256
    uniform   the whole matrix the paper's sampling: int(density * out * in) of all positions
    block     tile b x (w b)   b x b blocks, balanced so that block-columns differ by at most k a window;
                               row-parallel layers use the transposed tile, (w b) x b
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sltrain_dist.config import SupportKind
from sltrain_dist.ops.generate import distinct_offsets, sample_positions
from sltrain_dist.ops.tiles import Tiles
from sltrain_dist.utils import counter_random
from sltrain_dist.utils.errors import UserError

MAX_WINDOW = 256  # so that an offset fits one byte
_CHUNK = 1 << 15  # tiles or entries computed at a time: the working set stays in the cache


def windows(length: int, density: float) -> list[tuple[int, int]]:
    """All (w, k) that cut ``length`` positions into windows with k/w within 10% of ``density``, best first."""
    found = []
    for w in range(1, min(length, MAX_WINDOW) + 1):
        k = round(density * w)
        if length % w == 0 and 1 <= k < w and abs(k / w - density) <= 0.1 * density:
            count = length // w
            divisible = next(d for d in (8, 4, 2, 1) if count % d == 0)
            found.append((-divisible, abs(k / w - density), -w, k))
    return [(-negative_w, k) for _, _, negative_w, k in sorted(found)]


def nearest_density(length: int, density: float) -> float:
    """The density closest to the asked one that some window of ``length`` reaches."""
    reachable = [
        k / w for w in range(2, min(length, MAX_WINDOW) + 1) if length % w == 0 for k in range(1, w)
    ]
    if not reachable:
        raise UserError(
            f"--sp_ratio {density}: a dimension of {length} cannot hold a sparse support"
        )
    return min(reachable, key=lambda reached: abs(reached - density))


@dataclass(frozen=True)
class Support:
    """The support of one matrix: its kind, tile and count of blocks per tile, for the whole (unsharded) matrix."""

    kind: SupportKind
    shape: tuple[int, int]  # physical [out, in]
    logical: tuple[int, int]  # without padding
    tiles: Tiles
    k: int  # blocks per tile

    @classmethod
    def plan(
        cls,
        kind: SupportKind,
        shape: tuple[int, int],
        density: float,
        *,
        block: int = 1,
        transposed: bool = False,
        logical: tuple[int, int] | None = None,
    ) -> "Support":
        """Choose the tile for a matrix.

        Raises:
            UserError: density outside (0, 1), not reachable within 10%, or blocks that do not divide the matrix.
        """
        logical = logical or shape
        if not 0 < density < 1:
            raise UserError(f"--sp_ratio {density}: the density must lie strictly between 0 and 1")
        if kind == "uniform":
            count = int(density * logical[0] * logical[1])
            if count < 1:
                raise UserError(
                    f"--sp_ratio {density}: a {logical[0]} x {logical[1]} matrix would get no entry"
                )
            return cls(kind, shape, logical, Tiles(*shape, 1), count)
        if kind == "fan_in":
            block, transposed = 1, False
        out_blocks, in_blocks = shape[0] // block, shape[1] // block
        if shape[0] % block or shape[1] % block:
            raise UserError(
                f"--block_size {block}: does not divide the {shape[0]} x {shape[1]} matrix"
            )
        length = out_blocks if transposed else in_blocks
        choice = windows(length, density)
        if not choice and block > 1 and length < 2:
            raise UserError(
                f"--block_size {block}: a {shape[0]} x {shape[1]} matrix has a single such block along a dimension;"
                " take a smaller one"
            )
        if not choice:
            near = nearest_density(length, density)
            raise UserError(
                f"--sp_ratio {density}: support {kind} cannot reach it on a {shape[0]} x {shape[1]} matrix; "
                f"the nearest density that fits is {near:.4g}"
                + (f", or take a --block_size below {block}" if block > 1 else "")
            )
        w, k = choice[0]
        tile = (w * block, block) if transposed else (block, w * block)
        return cls(kind, shape, logical, Tiles(*tile, block), k)

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles along dim 0 and dim 1."""
        return self.shape[0] // self.tiles.tile_out, self.shape[1] // self.tiles.tile_in

    @property
    def positions(self) -> int:
        """Places a block can take in a tile."""
        return self.tiles.tile_out * self.tiles.tile_in // self.tiles.block**2

    @property
    def offset_dtype(self) -> torch.dtype:
        """uint8 where a tile has at most 256 positions, else int32 (int16 fails on NCCL and gloo)."""
        return torch.uint8 if self.positions <= 256 else torch.int32

    @property
    def offsets_shape(self) -> tuple[int, ...]:
        return (self.k,) if self.kind == "uniform" else (*self.grid, self.k)

    @property
    def values_shape(self) -> tuple[int, ...]:
        return (self.k,) if self.kind == "uniform" else (*self.grid, self.k, self.tiles.block**2)

    @property
    def is_padded(self) -> bool:
        return self.shape != self.logical

    @cached_property
    def density(self) -> float:
        """The density really reached, over the physical matrix (over the logical one for uniform)."""
        if self.kind == "uniform":
            return self.k / (self.logical[0] * self.logical[1])
        return self.k / self.positions

    def offsets(
        self, seed: int, name: str, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Elements [start, stop) of the flattened global offsets tensor, in ``offset_dtype``.

        Args:
            seed: of the run.
            name: the layer's full name; other layers get other patterns.
        """
        key = counter_random.signed(counter_random.key(seed, name, "support"))
        if self.kind == "uniform":
            return self._uniform(key, device)[start:stop]
        first, last = start // self.k, -(-stop // self.k)
        make = self._balanced if self.kind == "block" else self._independent
        parts = [
            make(key, torch.arange(tile, min(tile + _CHUNK, last), device=device))
            for tile in range(first, last, _CHUNK)
        ]
        flat = (
            torch.cat(parts).view(-1)
            if parts
            else torch.empty(0, dtype=self.offset_dtype, device=device)
        )
        return flat[start - first * self.k : stop - first * self.k]

    def offsets_at(self, seed: int, name: str, index: Tensor) -> Tensor:
        """The elements at ``index`` (1-D int64, ascending) of the flattened global offsets tensor."""
        if self.kind == "uniform":
            return self.offsets(seed, name, 0, self.k, index.device)[index]
        key = counter_random.signed(counter_random.key(seed, name, "support"))
        tile, place = torch.unique_consecutive(index // self.k, return_inverse=True)
        make = self._balanced if self.kind == "block" else self._independent
        return make(key, tile).view(-1, self.k)[place, index % self.k]

    def _independent(self, key: int, tile: Tensor) -> Tensor:
        """k distinct positions for every tile, sorted, by Floyd's sampling (CACM 30(9), 1987)."""
        offsets: Tensor = distinct_offsets(key, tile, self.positions, self.k)
        return offsets.to(self.offset_dtype)

    def _balanced(self, key: int, tile: Tensor) -> Tensor:
        """k positions per tile such that each group of m lines forms a circulant in a shuffled order.

        Line i of a group takes pi[(i + s_j) mod m] with a permutation pi and k distinct shifts s of
        the group, so every position of the window is taken by exactly k of the group's m lines.
        """
        m = self.positions
        rows, columns = self.grid
        row, column = tile // columns, tile % columns
        # The line counts across the window: block-rows, or block-columns of the transposed tile.
        line, window, window_count = (row, column, columns)
        if self.tiles.tile_out > self.tiles.block:
            line, window, window_count = (column, row, rows)
        group = (line // m) * window_count + window
        unique, inverse = group.unique(return_inverse=True)
        position = torch.arange(m, device=tile.device)
        keys = counter_random.hash64(key, unique[:, None] * m + position)
        pi = keys.argsort(dim=1)
        shifts = distinct_offsets(key ^ 0x5DEECE66D, unique, m, self.k).long()
        taken = (line % m)[:, None].add(shifts[inverse]) % m
        return pi[inverse].gather(1, taken).sort(dim=1).values.to(self.offset_dtype)

    def _uniform(self, key: int, device: torch.device | str) -> Tensor:
        """``k`` positions of the logical matrix without replacement, sorted, as flat physical positions."""
        count = self.logical[0] * self.logical[1]
        positions = torch.empty(self.k, dtype=torch.int32, device=device)
        sample_positions(positions, key, count)
        flat = positions.long()
        row = flat // self.logical[1]
        return (flat + row * (self.shape[1] - self.logical[1])).to(self.offset_dtype)

    def inside(
        self, seed: int, name: str, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Which elements [start, stop) of the flattened global values lie in the logical matrix; bool."""
        area = self.tiles.block**2
        first, last = start // area, -(-stop // area)
        entry = torch.arange(first, last, device=device)
        mask = self._inside(entry, self.offsets(seed, name, first, last, device))
        return mask.view(-1)[start - first * area : stop - first * area]

    def inside_at(self, seed: int, name: str, index: Tensor) -> Tensor:
        """Which elements at ``index`` (1-D int64, ascending) of the flattened global values lie there; bool."""
        area = self.tiles.block**2
        entry, place = torch.unique_consecutive(index // area, return_inverse=True)
        return self._inside(entry, self.offsets_at(seed, name, entry))[place, index % area]

    def _inside(self, entry: Tensor, offset: Tensor) -> Tensor:
        """Which elements of blocks ``entry`` (positions in the flattened offsets) lie in the logical matrix, [n, area]."""
        offset = offset.long()
        if self.kind == "uniform":
            row, column = offset // self.shape[1], offset % self.shape[1]
        else:
            tile = entry // self.k
            row = tile // self.grid[1] * self.tiles.tile_out
            column = tile % self.grid[1] * self.tiles.tile_in
            along_in = self.tiles.tile_out == self.tiles.block
            if along_in:
                column = column + offset * self.tiles.block
            else:
                row = row + offset * self.tiles.block
        step = torch.arange(self.tiles.block**2, device=entry.device)
        row = row[:, None] + step // self.tiles.block
        column = column[:, None] + step % self.tiles.block
        return (row < self.logical[0]) & (column < self.logical[1])


def partial_hash(
    seed: int,
    name: str,
    start: int,
    offsets: Tensor,
    place: Callable[[Tensor], Tensor] | None = None,
) -> int:
    """Hash of elements [start, start + n) of a layer's flattened offsets, as a number mod 2**64.

    Sums over any partition of the elements give the same total, so the hash of a model's support is
    free of layout: add up what every rank holds, each element once.

    place: where elements of a part stand in the flattened global tensor; None: where they stand here.
    """
    total = 0
    stream = counter_random.key(seed, name, "hash")
    for begin in range(0, offsets.numel(), _CHUNK):
        part = offsets.reshape(-1)[begin : begin + _CHUNK].long()
        index = torch.arange(start + begin, start + begin + part.numel(), device=offsets.device)
        index = index if place is None else place(index)
        total += int(counter_random.mix64(counter_random.hash64(stream, index) + part).sum())
    return total & 0xFFFFFFFFFFFFFFFF
