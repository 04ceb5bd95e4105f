"""The reference formula: SLTrain computed as its authors describe it (arXiv 2406.02214, algorithm 1).

W = B A' + S is built by a product and a scatter at int64 positions, used, and forgotten; backward builds it
again and forms the whole of dW, from which dB, dA' and the values' gradient are taken. A' = scale * A is made
outside, so autograd keeps that copy of every layer. Written from the description; how close its time is to the
authors' compiled extension is recorded in results/reference_extension_cpu.json.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sltrain_dist.ops.precision import compute_dtype, widened
from sltrain_dist.params.linears import SLTrain


def _weight(b: Tensor, a: Tensor, values: Tensor, index: Tensor) -> Tensor:
    w = b @ a
    w.view(-1).scatter_add_(0, index, values)
    return w


class ReferenceFormula(torch.autograd.Function):
    """y = x (B A' + S)^T; x [..., in], B [out, r], A' [r, in], values [k], index [k] int64 -> [..., out].

    On a CPU bfloat16 is widened as ours is (ops.precision), which is many times faster than not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor, a: Tensor, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, b, a, values, index)
        wide, b, a, values = widened(compute_dtype(x), x, b, a, values)
        return functional.linear(wide, _weight(b, a, values, index)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, b, a, values, index = ctx.saved_tensors
        narrow = x.dtype
        dy, wide, b, a, values = widened(compute_dtype(x), grads[0], x, b, a, values)
        w = _weight(b, a, values, index)
        dy2 = dy.reshape(-1, w.shape[0])
        dx = (dy2 @ w).view(x.shape)
        dw = dy2.t() @ wide.reshape(-1, w.shape[1])
        results = (dx, dw @ a.t(), b.t() @ dw, dw.view(-1).gather(0, index))
        return (*(grad.to(narrow) for grad in results), None)


def reference_linear(
    x: Tensor, b: Tensor, a: Tensor, scale: float, values: Tensor, index: Tensor
) -> Tensor:
    """The formula with its scaled copy of A."""
    y: Tensor = ReferenceFormula.apply(x, b, a * scale, values, index)
    return y


class ReferenceLinear(nn.Module):
    """Takes the place, and the parameters, of an SLTrain linear whose support is ``uniform``."""

    index: Tensor

    def __init__(self, ours: SLTrain) -> None:
        super().__init__()
        if ours.support.kind != "uniform":
            raise ValueError(f"the reference's support is uniform, not {ours.support.kind}")
        self.b, self.a, self.values = ours.b, ours.a, ours.values
        self.scale = ours.method.scale
        self.register_buffer("index", ours.offsets.detach().long())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return reference_linear(x, self.b, self.a, self.scale, self.values, self.index)


def use_reference(model: nn.Module) -> None:
    """Swap every SLTrain linear of a filled model, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SLTrain):
                setattr(parent, name, ReferenceLinear(child))
