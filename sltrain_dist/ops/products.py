"""Forward and backward of every kind of linear as plain functions, without autograd and without bias.

For an autograd node that decides itself what it keeps: under tensor parallelism (parallel.linear) a
node keeps shards only, and hands the gathered tensors to these functions.

    dense      y = x W^T                           tensors: weight
    low_rank   y = s * (x A^T) B^T                 tensors: b, a, scaling
    sltrain    y = x (s * B A + S)^T               tensors: b, a, values, offsets, scaling
    slope      y = x W^T, W pruned                 tensors: values, offsets, backward

s = scale, or tanh(scaling) where it is trained. Shapes: n tokens, r rank, out and in the features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sltrain_dist.ops.composed import effective_scale
from sltrain_dist.ops.linear import Path, keeps_hidden
from sltrain_dist.ops.pattern import Pattern
from sltrain_dist.ops.precision import compute_dtype, widened
from sltrain_dist.ops.pruned import pruned_linear, pruned_linear_backward
from sltrain_dist.ops.tiles import Tiles

Tensors = Mapping[str, Tensor | None]


class Product(Protocol):
    """One kind of linear."""

    def forward(self, x: Tensor, tensors: Tensors, keep: bool) -> tuple[Tensor, Tensor | None]:
        """y [..., out] of x [..., in]; and h = x A^T [n, r] where ``keep`` allows it and the kind has it."""
        ...

    def backward(
        self, dy: Tensor, x: Tensor, tensors: Tensors, hidden: Tensor | None, need_x: bool
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """dx (None where not needed) and the gradients of the trained tensors, in their dtypes."""
        ...


@dataclass(frozen=True)
class Dense:
    """y = x W^T."""

    def forward(self, x: Tensor, tensors: Tensors, keep: bool) -> tuple[Tensor, Tensor | None]:
        wide_x, weight = widened(compute_dtype(x), x, tensors["weight"])
        return (wide_x @ weight.t()).to(x.dtype), None

    def backward(
        self, dy: Tensor, x: Tensor, tensors: Tensors, hidden: Tensor | None, need_x: bool
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        dtype, shape = x.dtype, x.shape
        dy, x, weight = widened(compute_dtype(x), dy, x, tensors["weight"])
        dy, x = dy.flatten(0, -2), x.flatten(0, -2)
        dx = (dy @ weight).to(dtype).view(shape) if need_x else None
        return dx, {"weight": (dy.t() @ x).to(dtype)}


@dataclass(frozen=True)
class LowRank:
    """y = s * (x A^T) B^T; h = x A^T is kept."""

    scale: float

    def forward(self, x: Tensor, tensors: Tensors, keep: bool) -> tuple[Tensor, Tensor | None]:
        wide_x, b, a = widened(compute_dtype(x), x, tensors["b"], tensors["a"])
        hidden = wide_x.flatten(0, -2) @ a.t()
        y = (hidden * effective_scale(tensors["scaling"], self.scale, hidden.dtype)) @ b.t()
        return y.to(x.dtype).view(*x.shape[:-1], -1), hidden.to(x.dtype) if keep else None

    def backward(
        self, dy: Tensor, x: Tensor, tensors: Tensors, hidden: Tensor | None, need_x: bool
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        assert hidden is not None
        dtype, shape, scaling = x.dtype, x.shape, tensors["scaling"]
        dy, x, hidden, b, a = widened(compute_dtype(x), dy, x, hidden, tensors["b"], tensors["a"])
        dy, x = dy.flatten(0, -2), x.flatten(0, -2)
        s = effective_scale(scaling, self.scale, x.dtype)
        dh = dy @ b
        gradients = {}
        if scaling is not None:
            wide = torch.promote_types(x.dtype, torch.float32)
            slope = 1 - torch.tanh(scaling.to(wide)) ** 2
            gradients["scaling"] = ((dh.to(wide) * hidden.to(wide)).sum() * slope).to(scaling.dtype)
        dh = dh * s
        dx = (dh @ a).to(dtype).view(shape) if need_x else None
        gradients["a"] = (dh.t() @ x).to(dtype)
        gradients["b"] = (dy.t() @ hidden).mul_(s).to(dtype)
        return dx, gradients


@dataclass(frozen=True)
class SLTrain:
    """y = x (s * B A + S)^T by either path; without factors y = x S^T."""

    scale: float
    tiles: Tiles
    path: Path
    keep_hidden: bool | None

    def forward(self, x: Tensor, tensors: Tensors, keep: bool) -> tuple[Tensor, Tensor | None]:
        sizes = (self.scale, self.tiles.tile_out, self.tiles.tile_in, self.tiles.block)
        names = ("b", "a", "values", "offsets")
        arguments = (x, *(tensors[name] for name in names), None, tensors["scaling"], *sizes)
        operators = torch.ops.sltrain_dist
        if self.path == "composed":
            return operators.composed_linear(*arguments), None
        keep = keep and tensors["a"] is not None and keeps_hidden(x, self.keep_hidden)
        y, hidden = operators.factorized_linear(*arguments, keep)
        return y, hidden if keep else None

    def backward(
        self, dy: Tensor, x: Tensor, tensors: Tensors, hidden: Tensor | None, need_x: bool
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        names = ("b", "a", "values", "scaling")
        needs = [need_x, *(tensors[name] is not None for name in names)]
        sizes = (self.scale, self.tiles.tile_out, self.tiles.tile_in, self.tiles.block)
        inputs = (tensors["b"], tensors["a"], tensors["values"], tensors["offsets"])
        operators, rest = torch.ops.sltrain_dist, (tensors["scaling"], *sizes, needs)
        if self.path == "composed":
            grads = operators.composed_linear_backward(dy, x, *inputs, *rest)
        else:
            grads = operators.factorized_linear_backward(dy, x, *inputs, hidden, *rest)
        dx, *others = grads
        found = {
            name: grad
            for name, grad in zip(names, others, strict=True)
            if tensors[name] is not None
        }
        return dx if need_x else None, found


@dataclass(frozen=True)
class Pruned:
    """y = x W^T with W pruned N:M, and dx by the W that is pruned twice (ops.pruned)."""

    pattern: Pattern

    def forward(self, x: Tensor, tensors: Tensors, keep: bool) -> tuple[Tensor, Tensor | None]:
        inputs = (tensors["values"], tensors["offsets"], tensors["backward"], None)
        y: Tensor = pruned_linear(x, *inputs, self.pattern.kept, self.pattern.group)
        return y, None

    def backward(
        self, dy: Tensor, x: Tensor, tensors: Tensors, hidden: Tensor | None, need_x: bool
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        inputs = (tensors["values"], tensors["offsets"], tensors["backward"])
        sizes = (self.pattern.kept, self.pattern.group)
        dx, dvalues = pruned_linear_backward(dy, x, *inputs, *sizes, [need_x, True])
        return dx if need_x else None, {"values": dvalues}
