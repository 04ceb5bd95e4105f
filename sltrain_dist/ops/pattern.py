"""N:M patterns: of every M neighbours N are kept. Which ones, and how they are written down in few bits.

Packed numbers stand in uint8, the first in the low bits. Nothing here knows of layers: see ops.pruned for the
product, params.slope for the parameters.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_PANEL = 1 << 22  # elements of W that the second pruning looks at together


@dataclass(frozen=True)
class Pattern:
    """``kept`` of every ``group`` neighbours have a value: N and M."""

    kept: int
    group: int

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Of "2:4".

        Raises:
            ValueError: it is not N:M with 1 <= N < M <= 256.
        """
        kept, _, group = text.partition(":")
        pattern = cls(int(kept), int(group))
        if not 1 <= pattern.kept < pattern.group <= 256:
            raise ValueError(text)
        return pattern

    @property
    def bits(self) -> int:
        """Of a packed position: the least of 1, 2, 4, 8 that holds M - 1."""
        return next(bits for bits in (1, 2, 4, 8) if self.group <= 1 << bits)

    @property
    def density(self) -> float:
        """Share of the weights that have a value."""
        return self.kept / self.group

    @property
    def density_twice(self) -> float:
        """Share that the second pruning leaves, expected of random weights: the mean of min(N, kept of M) over M."""
        share, size = self.density, self.group
        chances = (
            math.comb(size, k) * share**k * (1 - share) ** (size - k) * min(k, self.kept)
            for k in range(size + 1)
        )
        return sum(chances) / size

    def width(self, in_features: int) -> int:
        """Values of a row."""
        return in_features // self.group * self.kept

    def in_features(self, width: int) -> int:
        """The inverse of `width`."""
        return width // self.kept * self.group

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` packed numbers."""
    return -(-count * bits // 8)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Numbers below 2**bits, [..., k] -> uint8 [..., `packed_bytes`], zeros in what the last byte has left."""
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=numbers.device)
    spare = -numbers.shape[-1] % (8 // bits)
    wide = torch.nn.functional.pad(numbers.to(torch.int32), (0, spare))
    grouped = wide.unflatten(-1, (-1, 8 // bits))
    packed: Tensor = (grouped << shifts).sum(-1, dtype=torch.int32).to(torch.uint8)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: the first ``count`` numbers of a row, uint8."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    numbers = (packed.unsqueeze(-1) >> shifts).bitwise_and_((1 << bits) - 1)
    return numbers.flatten(-2)[..., :count].contiguous()


def are_largest(magnitudes: Tensor, pattern: Pattern) -> Tensor:
    """Which of every M neighbours along the last dimension are the N largest; of equals the first. bool.

    Each is compared with its M - 1 neighbours: sorting many groups of four is far slower.
    """
    groups = magnitudes.unflatten(-1, (-1, pattern.group))
    place = torch.arange(pattern.group, device=magnitudes.device)
    larger = torch.zeros(groups.shape, dtype=torch.int16, device=magnitudes.device)
    for other in range(pattern.group):
        rival = groups[..., other : other + 1]
        larger += (rival > groups) | ((rival == groups) & (place > other))
    return (larger < pattern.kept).flatten(-2)


def positions_of_largest(magnitudes: Tensor, pattern: Pattern) -> Tensor:
    """Of every group [n, M] the places of its N largest, ascending; of equals the first. int64 [n, N]."""
    return are_largest(magnitudes, pattern).nonzero()[:, 1].view(-1, pattern.kept)


def prune_rows(values: Tensor, offsets: Tensor, pattern: Pattern) -> Tensor:
    """The mask of the second pruning, uint8 [rows, width / 8 rounded up] as ops.pruned has it.

    Of every column and every M neighbouring rows the N largest of the values that are there; of equals the first.

    Args:
        values: [rows, width], rows a multiple of M; NaN is as large as anything.
        offsets: packed, as ops.pruned has them.
    """
    width, in_features = values.shape[1], pattern.in_features(values.shape[1])
    mask = values.new_empty(values.shape[0], packed_bytes(width, 1), dtype=torch.uint8)
    step = max(1, _PANEL // (in_features * pattern.group)) * pattern.group
    first = torch.arange(width, device=values.device) // pattern.kept * pattern.group
    for start in range(0, values.shape[0], step):
        rows = slice(start, start + step)
        column = unpack(offsets[rows], pattern.bits, width) + first  # int64
        magnitudes = values[rows].abs()
        # Below all values, zeros too: where there is none, nothing can be kept.
        w = magnitudes.new_full((column.shape[0], in_features), -1.0)
        w.scatter_(1, column, magnitudes)
        keeps = are_largest(w.t(), pattern).t()
        mask[rows] = pack(keeps.gather(1, column), 1)
    return mask
