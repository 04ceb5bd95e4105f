"""Linears of --method slope: an N:M pruned weight whose mask stays, and a second mask for the gradient of the input.

    values    [out, in N/M]          trained; start: the largest of each group of the dense weight of method full
    offsets   [out, in N/M bits/8]   where they stand: a pure function of seed and name, as those values are
    backward  [out, in N/M / 8]      the second pruning (ops.pruned): chosen from the values, at the start and every
                                     --mask_change_freq updates (parallel.masks), so a checkpoint must hold it

SLoPe (arXiv 2405.16325) leaves matrices dense whose sides differ more than fivefold: so does the row here. Which
pattern a layer has --slope_pattern says: "2:4", or "2:4,8-15=2:8" with other ones for ranges of decoder layers.
"""

import functools
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sltrain_dist.config import MethodConfig
from sltrain_dist.ops import products
from sltrain_dist.ops.pattern import Pattern, pack, packed_bytes, positions_of_largest
from sltrain_dist.ops.products import Product
from sltrain_dist.ops.pruned import pruned_linear
from sltrain_dist.params.initial import ParameterSpec, Random
from sltrain_dist.params.parameterized import Dense, LinearShape, ParameterizedLinear
from sltrain_dist.utils.errors import UserError

FLAG = "--slope_pattern"
_THIN = 5  # sides that differ more leave a matrix dense
_CHUNK = 1 << 16  # numbers made at a time
_RANGE = re.compile(r"(\d+)(?:-(\d+))?=(\d+:\d+)")


@functools.cache
def parse_patterns(text: str) -> tuple[Pattern, tuple[tuple[int, int, Pattern], ...]]:
    """Of "2:4,8-15=2:8": the pattern of layers that nothing else is said of, and (first, last, pattern) of ranges.

    Raises:
        UserError: it is not of that form.
    """
    default, *ranges = text.split(",")
    found = []
    try:
        pattern = Pattern.parse(default)
        for part in ranges:
            first, last, other = _RANGE.fullmatch(part).groups()  # type: ignore[union-attr]
            found.append((int(first), int(last or first), Pattern.parse(other)))
            if found[-1][0] > found[-1][1]:
                raise ValueError(part)
    except (ValueError, AttributeError):
        raise UserError(
            f"{FLAG} {text}: give N:M with N < M <= 256, as 2:4, and after it other ones for ranges of layers, "
            "as 2:4,8-15=2:8"
        ) from None
    return pattern, tuple(found)


def layer_pattern(text: str, layer: int | None) -> Pattern:
    """The pattern of decoder layer ``layer``, counted from 0; of ranges that overlap the last one holds."""
    pattern, ranges = parse_patterns(text)
    for first, last, other in ranges:
        if layer is not None and first <= layer <= last:
            pattern = other
    return pattern


def check_patterns(text: str, layers: int) -> None:
    """Refuse ranges that the model's ``layers`` do not have; raises UserError."""
    for _, last, pattern in parse_patterns(text)[1]:
        if last >= layers:
            raise UserError(
                f"{FLAG} {text}: {pattern} is for layers up to {last}, and the model's are 0 to {layers - 1}"
            )


def stays_dense(out_features: int, in_features: int) -> bool:
    """Whether a matrix is too long and thin to be pruned."""
    return max(out_features, in_features) > _THIN * min(out_features, in_features)


@dataclass(frozen=True)
class PrunedStart:
    """The dense weight [out, in] that pruning starts from, group by group; ``weight`` is its name in method full."""

    pattern: Pattern
    dense: Random
    weight: str

    @property
    def width(self) -> int:
        """Values of a row."""
        return self.pattern.width(self.dense.shape[1])

    def groups(self, seed: int, number: Tensor) -> tuple[Tensor, Tensor]:
        """Kept values [n, N], float32, and their places in groups ``number`` (int64 [n], ascending), int64 [n, N]."""
        size = self.pattern.group
        index = number[:, None] * size + torch.arange(size, device=number.device)
        weights = self.dense.at(seed, self.weight, index.flatten()).view(-1, size)
        places = positions_of_largest(weights.abs(), self.pattern)
        return weights.gather(1, places), places

    def at(self, seed: int, index: Tensor, places: bool) -> Tensor:
        """Values, or places, of the kept weights ``index`` (int64, ascending) of the flattened matrix of values."""
        number, row = torch.unique_consecutive(index // self.pattern.kept, return_inverse=True)
        found: Tensor = self.groups(seed, number)[int(places)]
        return found[row, index % self.pattern.kept]


@dataclass(frozen=True)
class PrunedValues:
    """Initial values of ``values``."""

    start: PrunedStart

    def flat(
        self, seed: int, name: str, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        out = torch.empty(stop - start, device=device)
        for begin in range(start, stop, _CHUNK):
            index = torch.arange(begin, min(begin + _CHUNK, stop), device=device)
            out[begin - start : begin - start + index.numel()] = self.at(seed, name, index)
        return out

    def at(self, seed: int, name: str, index: Tensor) -> Tensor:
        return self.start.at(seed, index, places=False)


@dataclass(frozen=True)
class PrunedOffsets:
    """``offsets``, packed; keyed by the weight like the values that they belong to."""

    start: PrunedStart

    def flat(
        self, seed: int, name: str, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        out = torch.empty(stop - start, dtype=torch.uint8, device=device)
        for begin in range(start, stop, _CHUNK):
            index = torch.arange(begin, min(begin + _CHUNK, stop), device=device)
            out[begin - start : begin - start + index.numel()] = self.at(seed, name, index)
        return out

    def at(self, seed: int, name: str, index: Tensor) -> Tensor:
        bits = self.start.pattern.bits
        each, width = 8 // bits, self.start.width
        row, byte = index // packed_bytes(width, bits), index % packed_bytes(width, bits)
        column = byte[:, None] * each + torch.arange(each, device=index.device)
        value = row[:, None] * width + column.clamp(max=width - 1)
        places = self.start.at(seed, value.flatten(), places=True).view(value.shape)
        return pack(places.masked_fill(column >= width, 0), bits).flatten()


@dataclass(frozen=True)
class SecondPruning:
    """``backward`` before it is chosen: everything is kept. ``pattern``: what it will be chosen by."""

    pattern: Pattern

    def flat(
        self, seed: int, name: str, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        return torch.full((stop - start,), 255, dtype=torch.uint8, device=device)

    def at(self, seed: int, name: str, index: Tensor) -> Tensor:
        return torch.full(index.shape, 255, dtype=torch.uint8, device=index.device)


class Slope(ParameterizedLinear):
    """y = x W^T + bias with W pruned N:M along its inputs; only values that were kept at the start are trained."""

    values: nn.Parameter
    offsets: nn.Parameter
    backward: nn.Parameter

    def __init__(self, shape: LinearShape, method: MethodConfig) -> None:
        super().__init__(shape)
        number = re.search(r"\.layers\.(\d+)\.", shape.name)
        self.pattern = layer_pattern(method.pattern, int(number[1]) if number else None)
        _check_sizes(shape, self.pattern, method.pattern)
        logical = (shape.logical_out, shape.logical_in)
        dense = Random("normal", shape.initializer_range, (shape.out, shape.in_), logical)
        start = PrunedStart(self.pattern, dense, f"{shape.name}.weight")
        out, width = shape.out, start.width
        count = shape.logical_out * _logical_width(shape.logical_in, self.pattern)
        self.add("values", ParameterSpec((out, width), "sparse", count, PrunedValues(start)))
        packed, bits = packed_bytes(width, self.pattern.bits), packed_bytes(width, 1)
        offsets = ParameterSpec((out, packed), "indices", out * packed, PrunedOffsets(start))
        mask = ParameterSpec((out, bits), "mask", out * bits, SecondPruning(self.pattern))
        self.add("offsets", offsets, torch.uint8)
        self.add("backward", mask, torch.uint8)

    def multiply(self, x: Tensor) -> Tensor:
        sizes = (self.pattern.kept, self.pattern.group)
        y: Tensor = pruned_linear(x, self.values, self.offsets, self.backward, self.bias, *sizes)
        return y

    @property
    def product(self) -> Product:
        return products.Pruned(self.pattern)

    def part_problem(self, size: int) -> str | None:
        shape, pattern = self.shape, self.pattern
        what, length, step = "outputs", shape.out, pattern.group
        if shape.row_parallel:
            what, length, step = "inputs", shape.in_, _columns_step(pattern)
        if size == 1 or length % (size * step) == 0:
            return None
        return f"its {length} {what} are no multiple of {size} x {step}"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.pattern}"


def slope_linear(shape: LinearShape, method: MethodConfig) -> ParameterizedLinear:
    """The linear of method slope: pruned, or dense where the matrix is long and thin."""
    if stays_dense(shape.logical_out, shape.logical_in):
        return Dense(shape, method)
    return Slope(shape, method)


def _columns_step(pattern: Pattern) -> int:
    """The fewest inputs whose groups fill whole bytes, of the second mask too: where tensor parallelism may cut."""
    groups = next(count for count in (1, 2, 4, 8) if count * pattern.kept % 8 == 0)
    return groups * pattern.group


def _logical_width(logical_in: int, pattern: Pattern) -> int:
    """Values of a row that are no padding: its weights, zero, are the last to be kept in their group."""
    whole, rest = divmod(logical_in, pattern.group)
    return whole * pattern.kept + min(rest, pattern.kept)


def _check_sizes(shape: LinearShape, pattern: Pattern, text: str) -> None:
    for length, what in ((shape.in_, "inputs"), (shape.out, "outputs")):
        if length % pattern.group:
            raise UserError(
                f"{FLAG} {text}: layer {shape.name} is {shape.out} x {shape.in_}, and {pattern} needs {what} in whole "
                f"groups of {pattern.group}; give its layers another pattern, as 2:4"
            )
