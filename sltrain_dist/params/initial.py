"""Initial values of parameters as pure functions of (seed, name, global element index).

Under meta-device initialisation a rank fills just the part it holds; were the numbers drawn from a
generator, every FSDP2 rank would write the same values into a different shard. Each parameter has a
ParameterSpec, in the table ``specs`` of the module that owns it; engines ask it for flat ranges.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from sltrain_dist.params.support import Support, partial_hash
from sltrain_dist.utils import counter_random

Kind = Literal["dense", "low_rank", "sparse", "indices", "mask"]
FROZEN: tuple[Kind, ...] = ("indices", "mask")  # integers; a mask changes while the model trains
_CHUNK = (
    1 << 16
)  # elements made at a time: float64 temporaries stay in the cache (3x faster than 1 << 20)
_FILLED = 1 << 20  # elements that `ParameterSpec.fill` has made before they are written: 4 MB


class Initial(Protocol):
    """Where a parameter's first values come from."""

    def flat(
        self, seed: int, name: str, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Elements [start, stop) of the row-major flattened global tensor; 1-D, float32 (offsets: integer)."""
        ...

    def at(self, seed: int, name: str, index: Tensor) -> Tensor:
        """The elements at ``index`` (1-D int64, ascending) of the flattened global tensor, on its device."""
        ...


@dataclass(frozen=True)
class Constant:
    """Every element is ``value``."""

    value: float

    def flat(
        self, seed: int, name: str, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        return torch.full((stop - start,), self.value, device=device)

    def at(self, seed: int, name: str, index: Tensor) -> Tensor:
        return torch.full(index.shape, self.value, device=index.device)


@dataclass(frozen=True)
class Random:
    """Uniform in [-spread, spread), or normal with standard deviation ``spread``; zero in the padding."""

    distribution: Literal["uniform", "normal"]
    spread: float
    shape: tuple[int, ...]
    logical: tuple[int, ...]

    def flat(
        self, seed: int, name: str, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        if self.spread == 0:  # B of sltrain: 44% of its elements at 7b
            return torch.zeros(stop - start, device=device)
        key = counter_random.key(seed, name, "initial")
        out = torch.empty(stop - start, device=device)
        for begin in range(start, stop, _CHUNK):
            index = torch.arange(begin, min(begin + _CHUNK, stop), device=device)
            out[begin - start : begin - start + index.numel()] = self._draw(key, index)
        return out

    def at(self, seed: int, name: str, index: Tensor) -> Tensor:
        return self._draw(counter_random.key(seed, name, "initial"), index).float()

    def _draw(self, key: int, index: Tensor) -> Tensor:
        if self.distribution == "normal":
            values = counter_random.normal(key, index).mul_(self.spread)
        else:
            values = counter_random.uniform(key, index).mul_(2).sub_(1).mul_(self.spread)
        if self.shape == self.logical:  # dividing is slower than all of the above
            return values
        remaining = index
        for size, real in zip(reversed(self.shape), reversed(self.logical), strict=True):
            if real < size:
                values = values.masked_fill(remaining % size >= real, 0.0)
            remaining = remaining // size
        return values


@dataclass(frozen=True)
class SupportValues:
    """Values of S, uniform in [-bound, bound); zero where the position is padding."""

    bound: float
    support: Support
    layer: str

    def flat(
        self, seed: int, name: str, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        values = self._random().flat(seed, name, start, stop, device)
        if self.support.is_padded:
            values *= self.support.inside(seed, self.layer, start, stop, device)
        return values

    def at(self, seed: int, name: str, index: Tensor) -> Tensor:
        values = self._random().at(seed, name, index)
        if self.support.is_padded:
            values *= self.support.inside_at(seed, self.layer, index)
        return values

    def _random(self) -> Random:
        count = torch.Size(self.support.values_shape).numel()
        return Random("uniform", self.bound, (count,), (count,))


@dataclass(frozen=True)
class SupportOffsets:
    """The support itself; keyed by the layer, not by the parameter, because values share it."""

    support: Support
    layer: str

    def flat(
        self, seed: int, name: str, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        return self.support.offsets(seed, self.layer, start, stop, device)

    def at(self, seed: int, name: str, index: Tensor) -> Tensor:
        return self.support.offsets_at(seed, self.layer, index)


@dataclass(frozen=True)
class Cut:
    """The part of a tensor that one tensor-parallel rank holds: chunk ``index`` of ``count`` equal ones along ``dim``."""

    dim: int
    index: int
    count: int


@dataclass(frozen=True)
class ParameterSpec:
    """What is known of a parameter before it exists.

    shape: global and physical. logical_numel: elements that count, without padding; of all ranks.
    cut: what of it the module holds under tensor parallelism; None: all of it.
    """

    shape: tuple[int, ...]
    kind: Kind
    logical_numel: int
    initial: Initial
    cut: Cut | None = None

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape that the module holds."""
        if self.cut is None:
            return self.shape
        dim, count = self.cut.dim, self.cut.count
        return (*self.shape[:dim], self.shape[dim] // count, *self.shape[dim + 1 :])

    def flat(
        self, seed: int, name: str, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Initial values of elements [start, stop) of the row-major flattened tensor that the module holds."""
        first = self.global_index(torch.tensor([start]))
        if self.cut is None or self.cut.dim == 0 or start >= stop:
            begin = int(first) if start < stop else 0
            return self.initial.flat(seed, name, begin, begin + stop - start, device)
        parts = []
        for begin in range(start, stop, _CHUNK):
            index = torch.arange(begin, min(begin + _CHUNK, stop), device=device)
            parts.append(self.initial.at(seed, name, self.global_index(index)))
        return torch.cat(parts)

    def fill(self, out: Tensor, seed: int, name: str, start: int) -> None:
        """Write the initial values of held elements [start, start + n) into ``out``, contiguous and of n elements.

        A few MB at a time: the largest matrix of a model is never held a second time, in float32.
        """
        flat = out.view(-1)
        stop = start + flat.numel()
        # A support is made in one piece: one sample of the matrix where it is of kind uniform.
        step = max(1, stop - start) if self.kind == "indices" else _FILLED
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            flat[begin - start : end - start] = self.flat(seed, name, begin, end, out.device)

    def global_index(self, index: Tensor) -> Tensor:
        """Where elements ``index`` of the flattened held tensor stand in the flattened global one; int64."""
        if self.cut is None:
            return index
        run = math.prod(self.local_shape[self.cut.dim :])  # elements that lie together in both
        return index // run * (run * self.cut.count) + self.cut.index * run + index % run

    def partial_hash(self, seed: int, name: str, start: int, offsets: Tensor) -> int:
        """`support.partial_hash` of held elements [start, start + n); sums over all ranks are free of layout."""
        return partial_hash(seed, name, start, offsets, self.global_index)


def matrix_spec(
    distribution: Literal["uniform", "normal"],
    spread: float,
    shape: tuple[int, ...],
    logical: tuple[int, ...] | None = None,
    kind: Kind = "dense",
) -> ParameterSpec:
    """Spec of a randomly initialised tensor whose padding, if any, stays zero."""
    logical = logical or shape
    return ParameterSpec(
        shape, kind, torch.Size(logical).numel(), Random(distribution, spread, shape, logical)
    )


def constant_spec(
    value: float,
    shape: tuple[int, ...],
    logical: tuple[int, ...] | None = None,
    kind: Kind = "dense",
) -> ParameterSpec:
    """Spec of a tensor that starts constant (norm weights, biases, B); a padded one must start at 0."""
    return ParameterSpec(shape, kind, torch.Size(logical or shape).numel(), Constant(value))


def collect_specs(model: nn.Module) -> dict[str, ParameterSpec]:
    """The spec of every parameter by its full name; a tied parameter appears once, under its first name.

    Raises:
        KeyError: a parameter without a spec, which would start as uninitialised memory.
    """
    specs: dict[str, ParameterSpec] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        known: dict[str, ParameterSpec] = getattr(module, "specs", {})
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full = f"{prefix}.{name}" if prefix else name
            if name not in known:
                raise KeyError(f"parameter {full} has no spec: nothing would initialise it")
            specs[full] = known[name]
    return specs


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Trained elements by kind, padding not counted, and the bytes of the indices, masks among them.

    Returns:
        {"total", "low_rank", "sparse", "dense", "indices_bytes"}; indices are in no other count.
    """
    counts = {"total": 0, "low_rank": 0, "sparse": 0, "dense": 0, "indices_bytes": 0}
    for spec in collect_specs(model).values():
        if spec.kind in FROZEN:
            size = 1  # packed
            if isinstance(spec.initial, SupportOffsets):
                size = spec.initial.support.offset_dtype.itemsize
            counts["indices_bytes"] += torch.Size(spec.shape).numel() * size
        else:
            counts[spec.kind] += spec.logical_numel
            counts["total"] += spec.logical_numel
    return counts
