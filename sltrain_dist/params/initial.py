"""Initial values of parameters as pure functions of (seed, name, global element index).

Under meta-device initialisation a rank fills just the part it holds; were the numbers drawn from a
generator, every FSDP2 rank would write the same values into a different shard. Each parameter has a
ParameterSpec, in the table ``specs`` of the module that owns it; engines ask it for flat ranges.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from sltrain_dist.params.support import Support
from sltrain_dist.utils import counter_random

Kind = Literal["dense", "low_rank", "sparse", "indices"]
_CHUNK = (
    1 << 16
)  # elements made at a time: float64 temporaries stay in the cache (3x faster than 1 << 20)


class Initial(Protocol):
    """Where a parameter's first values come from."""

    def flat(
        self, seed: int, name: str, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Elements [start, stop) of the row-major flattened global tensor; 1-D, float32 (offsets: integer)."""
        ...


@dataclass(frozen=True)
class Constant:
    """Every element is ``value``."""

    value: float

    def flat(
        self, seed: int, name: str, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        return torch.full((stop - start,), self.value, device=device)


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
        key = counter_random.key(seed, name, "initial")
        out = torch.empty(stop - start, device=device)
        for begin in range(start, stop, _CHUNK):
            index = torch.arange(begin, min(begin + _CHUNK, stop), device=device)
            out[begin - start : begin - start + index.numel()] = self._draw(key, index)
        return out

    def _draw(self, key: int, index: Tensor) -> Tensor:
        if self.distribution == "normal":
            values = counter_random.normal(key, index) * self.spread
        else:
            values = (counter_random.uniform(key, index) * 2 - 1) * self.spread
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
        count = torch.Size(self.support.values_shape).numel()
        values = Random("uniform", self.bound, (count,), (count,)).flat(
            seed, name, start, stop, device
        )
        if self.support.is_padded:
            values *= self.support.inside(seed, self.layer, start, stop, device)
        return values


@dataclass(frozen=True)
class SupportOffsets:
    """The support itself; keyed by the layer, not by the parameter, because values share it."""

    support: Support
    layer: str

    def flat(
        self, seed: int, name: str, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        return self.support.offsets(seed, self.layer, start, stop, device)


@dataclass(frozen=True)
class ParameterSpec:
    """What is known of a parameter before it exists.

    shape: global and physical. logical_numel: elements that count, without padding.
    """

    shape: tuple[int, ...]
    kind: Kind
    logical_numel: int
    initial: Initial


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
    """Trained elements by kind, padding not counted, and the bytes of the indices.

    Returns:
        {"total", "low_rank", "sparse", "dense", "indices_bytes"}; indices are in no other count.
    """
    counts = {"total": 0, "low_rank": 0, "sparse": 0, "dense": 0, "indices_bytes": 0}
    for spec in collect_specs(model).values():
        if isinstance(spec.initial, SupportOffsets):
            size = spec.initial.support.offset_dtype.itemsize
            counts["indices_bytes"] += torch.Size(spec.shape).numel() * size
        else:
            counts[spec.kind] += spec.logical_numel
            counts["total"] += spec.logical_numel
    return counts
