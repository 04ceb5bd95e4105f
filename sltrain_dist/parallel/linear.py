"""Column- and row-parallel linears of every parameterization, as one autograd node that keeps shards only.

    column (q, k, v, gate, up)         row (o, down)
    B, values, offsets cut by rows     A, values, offsets cut by columns   (and slope's second mask)
    A [r/t, in] cut along r            B [out, r/t] cut along r
    y_i = x (s B_i A + S_i)^T          y = sum_i x_i (s B A_i + S_i)^T

The factor cut along r is gathered for use, in forward and again in backward, and its gradient is
reduce-scattered: no rank keeps a whole factor between the two. Under sequence parallelism the
gathered input is not kept either, but gathered again in backward, once for all linears that take it.

Shapes: r rank, out and in the features, t tensor-parallel ranks.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sltrain_dist.ops.products import LowRank as LowRankProduct
from sltrain_dist.ops.products import Product
from sltrain_dist.parallel.tensor import SEQUENCE, TensorParallel, gather_dim, scatter_dim
from sltrain_dist.params.initial import Cut
from sltrain_dist.params.linears import SLTrain
from sltrain_dist.params.parameterized import ParameterizedLinear

TRAINED = ("weight", "b", "a", "values", "scaling")
FROZEN = ("offsets", "backward")
_NAMES = (*TRAINED, *FROZEN)


class Region:
    """The linears between an `enter` and an `exit`, in the order of their use.

    It shares out what they have in common: the gathered input, and gathers that start before their turn.
    """

    def __init__(self, tp: TensorParallel) -> None:
        self.tp = tp
        self.linears: list[ParallelLinear] = []
        self.input: tuple[Tensor, Tensor, _Input] | None = (
            None  # whole, this rank's shard, how to get the whole again
        )
        self._started: dict[ParallelLinear, Callable[[], Tensor]] = {}

    def enter(self, x: Tensor) -> Tensor:
        """The region's input on every rank; see `TensorParallel.enter`."""
        for wait in self._started.values():  # of a backward pass that was given up
            wait()
        self._started.clear()
        whole = self.tp.enter(x)
        self.input = (whole, x.detach(), _Input(self.tp)) if self.tp.sequence else None
        return whole

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter_hook(
        self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`enter` as a forward pre-hook of the module whose first argument is the region's input."""
        if arguments:
            return (self.enter(arguments[0]), *arguments[1:]), named
        return (), named | {"hidden_states": self.enter(named["hidden_states"])}

    def factor(self, linear: "ParallelLinear", backward: bool) -> Tensor:
        """The whole factor of ``linear``; gathers of the linears after it are started with it."""
        if linear not in self._started:
            order = self.linears[::-1] if backward else self.linears
            ahead = order[order.index(linear) :] if self.tp.prefetch else [linear]
            for other in ahead:
                if other.factor is not None and other not in self._started:
                    self._started[other] = other.start_gather()
        return self._started.pop(linear)()


class _Input:
    """How a region's input is had again in backward, where only the shard was kept; the linears share one."""

    def __init__(self, tp: TensorParallel) -> None:
        self._group = tp.group
        self._users = 0
        self._whole: Tensor | None = None

    def use(self) -> None:
        """Another linear will ask for it."""
        self._users += 1

    def whole(self, shard: Tensor) -> Tensor:
        """All positions; gathered for the first who asks, forgotten after the last."""
        whole = self._whole
        if whole is None:
            whole = self._whole = gather_dim(shard, SEQUENCE, self._group)()
        self._users -= 1
        if self._users <= 0:
            self._whole = None
        return whole


class ParallelLinear:
    """Computes a ParameterizedLinear whose parameters have been cut; call it with the rank's input.

    row: the input is cut (o, down), else the output.
    """

    def __init__(self, linear: ParameterizedLinear, region: Region) -> None:
        self.linear, self.region, self.tp = linear, region, region.tp
        self.row = linear.shape.row_parallel
        names = dict(linear.named_parameters(recurse=False))
        self.factor = ("b" if self.row else "a") if "b" in names else None  # the one cut along r
        self.dim = 1 if self.row else 0  # where it is cut
        region.linears.append(self)

    def start_gather(self) -> Callable[[], Tensor]:
        """Start gathering the factor that is cut along r."""
        assert self.factor is not None
        part: Tensor = getattr(self.linear, self.factor).detach()
        return gather_dim(part, self.dim, self.tp.group)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, x: Tensor) -> Tensor:
        linear, bias = self.linear, self.linear.bias
        try:
            y = self._with_dropout(x) if linear.dropout else self._multiplied(x, linear.product)
        finally:
            if self.row:
                self.region.input = (
                    None  # or it would outlive what activation checkpointing forgets
                )
        if self.row:
            y = self.tp.exit(y)
            if bias is not None:  # once, after the sum
                y = y + (self.tp.shared(bias) if self.tp.sequence else bias)
            return y
        return y if bias is None else y + bias

    def _multiplied(self, x: Tensor, product: Product, without: tuple[str, ...] = ()) -> Tensor:
        """The product with the parameters that are there, but for those named ``without``."""
        tensors: dict[str, Tensor | None] = dict.fromkeys(_NAMES)
        for name, parameter in self.linear.named_parameters(recurse=False):
            if name not in ("bias", *without):
                tensors[name] = self.tp.shared(parameter) if name == "scaling" else parameter
        shard = source = None
        if self.region.input is not None and _same(self.region.input[0], x):
            _, shard, source = self.region.input
        keep = torch.is_grad_enabled()
        y: Tensor = _Node.apply(self, product, source, shard, keep, x, *tensors.values())
        return y

    def _with_dropout(self, x: Tensor) -> Tensor:
        """Dropout acts on the input of the low-rank product alone, which is kept whole for backward."""
        linear = self.linear
        dropped = self._dropped(x, linear.dropout)
        if not isinstance(linear, SLTrain):
            return self._multiplied(dropped, linear.product)
        sparse = self._multiplied(x, linear.product, without=("b", "a", "scaling"))
        factors = LowRankProduct(linear.method.scale)
        return sparse + self._multiplied(dropped, factors, without=("values", "offsets"))

    def _dropped(self, x: Tensor, probability: float) -> Tensor:
        """Dropout whose masks agree where ranks hold the same input (column) and differ where not (row).

        The default generator agrees over tensor-parallel ranks and is what checkpoints keep; a row-parallel
        layer draws one number from it and seeds a generator of its own with that and its rank.
        """
        if not self.row:
            return functional.dropout(x, probability)
        seed = int(torch.randint(2**62, ()))
        generator = torch.Generator(x.device).manual_seed(seed + self.tp.rank)
        kept = torch.rand(x.shape, generator=generator, device=x.device) >= probability
        return x * kept.to(x.dtype) / (1 - probability)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory; DeepSpeed's hooks hand a module another object of its input."""
    return one.shape == other.shape and one.data_ptr() == other.data_ptr()


class _Node(torch.autograd.Function):
    """y = x W^T of the rank's part, for every kind of linear."""

    @staticmethod
    def forward(
        ctx: Any,
        linear: ParallelLinear,
        product: Product,
        source: _Input | None,
        shard: Tensor | None,
        keep: bool,
        x: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        y, hidden = product.forward(x, _gathered(linear, tensors, backward=False), keep)
        if keep and source is not None:
            source.use()
        ctx.save_for_backward(x if shard is None else shard, hidden, *tensors)
        ctx.linear, ctx.product, ctx.source = linear, product, source
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        linear: ParallelLinear = ctx.linear
        x, hidden, *tensors = ctx.saved_tensors
        if ctx.source is not None:
            x = ctx.source.whole(x)
        gathered = _gathered(linear, tensors, backward=True)
        dx, found = ctx.product.backward(grads[0], x, gathered, hidden, ctx.needs_input_grad[5])
        if linear.factor in found:
            found[linear.factor] = scatter_dim(found[linear.factor], linear.dim, linear.tp.group)
        return None, None, None, None, None, dx, *(found.get(name) for name in _NAMES)


def _gathered(linear: ParallelLinear, tensors: Any, backward: bool) -> dict[str, Tensor | None]:
    """The tensors by name, the factor that is cut along r whole."""
    named = dict(zip(_NAMES, tensors, strict=True))
    if linear.factor is not None and named[linear.factor] is not None:
        named[linear.factor] = linear.region.factor(linear, backward)
    return named


def cut_parameters(module: nn.Module, dims: dict[str, int], tp: TensorParallel) -> None:
    """Replace the (empty) parameters of ``module`` named in ``dims`` by parts, cut along the given dimension."""
    specs: Any = module.specs
    for name, dim in dims.items():
        old = module.get_parameter(name)
        spec = replace(specs[name], cut=Cut(dim, tp.rank, tp.size))
        empty = torch.empty(spec.local_shape, dtype=old.dtype, device=old.device)
        setattr(module, name, nn.Parameter(empty, requires_grad=old.requires_grad))
        specs[name] = spec


def cut_dims(linear: ParameterizedLinear) -> dict[str, int]:
    """Along which dimension each parameter of a linear is cut; those left out are on every rank."""
    names = [name for name, _ in linear.named_parameters(recurse=False)]
    if not linear.shape.row_parallel:
        return {name: 0 for name in names if name != "scaling"}
    return {name: 1 for name in names if name not in ("scaling", "bias")}


def parallelize_linear(linear: ParameterizedLinear, region: Region) -> None:
    """Cut a linear and have it computed by `ParallelLinear`."""
    cut_parameters(linear, cut_dims(linear), region.tp)
    linear.parallel = ParallelLinear(linear, region)
