"""Tensor parallelism as Megatron has it (arXiv 1909.08053, 2205.05198): what crosses ranks around a cut pair of layers.

Column-parallel linears (q, k, v, gate, up) give every rank a part of their features, the row-parallel
one after them (o, down) sums the parts. Around such a region:

                 enter: forward   backward          exit: forward     backward
    plain        nothing          all-reduce        all-reduce        nothing
    sequence     all-gather       reduce-scatter    reduce-scatter    all-gather

Under sequence parallelism a rank holds T / tp positions between the regions, for norms, dropout and
residuals; the sums are the same and so are the bytes. This file has the collectives; parallel.linear
the linears, parallel.vocabulary embedding and loss.

Shapes: B batch, T positions, D features; t = tp ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sltrain_dist.config import EngineConfig
from sltrain_dist.parallel.mesh import Mesh

# The second names are those of torch before 2.13.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
SEQUENCE = 1  # the dimension of positions in activations [B, T, D]


@dataclass(frozen=True)
class TensorParallel:
    """The tensor-parallel ranks, and how activations are held between the regions.

    sequence: cut along positions (sequence parallelism), else whole on every rank.
    prefetch: the engine has all parameters of a block at hand while the block runs, so that gathers
        of its factors may start before their turn; ZeRO-3 fetches them module by module.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    sequence: bool
    prefetch: bool

    def enter(self, x: Tensor) -> Tensor:
        """Activations on their way into a region: [B, T or T/t, D] -> [B, T, D]."""
        function: Any = _GatherSequence if self.sequence else _SumBackward
        y: Tensor = function.apply(x, self.group)
        return y

    def exit(self, x: Tensor) -> Tensor:
        """Partial sums [B, T, D] of all ranks on their way out of a region -> [B, T or T/t, D], summed."""
        function: Any = _ScatterSequence if self.sequence else _SumForward
        y: Tensor = function.apply(x, self.group)
        return y

    def shared(self, parameter: Tensor) -> Tensor:
        """A parameter that all ranks hold and of whose gradient each computes a part: the parts are summed."""
        y: Tensor = _SumBackward.apply(parameter, self.group)
        return y

    def gather_features(self, x: Tensor) -> Tensor:
        """[..., D/t] of every rank -> [..., D] on all; without gradient."""
        parts = all_gather(x.detach().contiguous(), self.group).wait()
        return torch.cat(parts.unbind(), dim=-1)


def tensor_parallel(mesh: Mesh, engine: EngineConfig) -> TensorParallel | None:
    """The tensor-parallel ranks of a mesh as an engine of this configuration can use them; None where it is one."""
    if mesh.tp_size == 1:
        return None
    by_module = engine.engine == "zero" and engine.stage == 3
    return TensorParallel(
        mesh.tp_group, mesh.tp_rank, mesh.tp_size, engine.sequence_parallel, prefetch=not by_module
    )


class Gather:
    """An all-gather under way."""

    def __init__(self, work: Any, buffer: Tensor) -> None:
        self._work, self._buffer = work, buffer

    def wait(self) -> Tensor:
        """The parts of all ranks, [t, ...]."""
        self._work.wait()
        return self._buffer


def all_gather(part: Tensor, group: dist.ProcessGroup) -> Gather:
    """Start gathering the contiguous ``part`` [...] of every rank."""
    buffer = part.new_empty((group.size(), *part.shape))
    work = _all_gather(buffer.flatten(0, 1), part, group=group, async_op=True)
    return Gather(work, buffer)


def reduce_scatter(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of ``parts`` [t, ...], of which this rank gets its own [...]."""
    parts = parts.contiguous()
    own = torch.empty_like(parts[0])
    _reduce_scatter(own, parts.flatten(0, 1), group=group)
    return own


def gather_dim(part: Tensor, dim: int, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Start gathering chunks along ``dim``; the result is a call that waits and gives the whole tensor."""
    gather = all_gather(part.contiguous(), group)
    return lambda: _joined(gather.wait(), dim)


def _joined(parts: Tensor, dim: int) -> Tensor:
    """[t, ...] -> chunks joined along ``dim``; no copy along the first."""
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def scatter_dim(whole: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of ``whole``, of which this rank gets its chunk along ``dim``."""
    size = group.size()
    parts = whole.unflatten(dim, (size, whole.shape[dim] // size)).movedim(dim, 0)
    return reduce_scatter(parts, group)


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _SumBackward(torch.autograd.Function):
    """Forward nothing; backward the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _summed(grads[0], ctx.group), None


class _SumForward(torch.autograd.Function):
    """Forward the sum over ranks; backward nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class _GatherSequence(torch.autograd.Function):
    """Forward all positions from every rank's; backward the sum over ranks, of which each gets its positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_dim(x, SEQUENCE, group)()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return scatter_dim(grads[0], SEQUENCE, ctx.group), None


class _ScatterSequence(torch.autograd.Function):
    """Forward the sum over ranks, of which each gets its positions; backward all positions from every rank's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return scatter_dim(x, SEQUENCE, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return gather_dim(grads[0], SEQUENCE, ctx.group)(), None
