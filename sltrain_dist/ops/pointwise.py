"""RMSNorm and SwiGLU as autograd nodes that keep their inputs and nothing that follows from them.

torch's RMSNorm on a CPU is a composition: it keeps x, the normalised x and, in bfloat16, both of them
widened to float32. ``silu(gate) * up`` keeps gate, up and silu(gate). The nodes below keep x and one
number a token, and gate and up; what else backward needs is a product away. Forward rounds exactly as
torch does. torch.compile sees through both and fuses them (tests/model/test_compile_fuses.py).

Shapes: ... tokens, D the normalised features, F the MLP's.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


class _RmsNorm(torch.autograd.Function):
    """Keeps x, the weight and 1 / rms(x), [..., 1] in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(_statistics_dtype(x))
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        normal = x.to(inverse.dtype) * inverse
        dy = dy.to(inverse.dtype)
        dx = dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dy * normal).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            dnormal = dy * weight
            along = (dnormal * normal).mean(-1, keepdim=True)
            dx = dnormal.sub_(normal.mul_(along)).mul_(inverse).to(x.dtype)
        return dx, dweight, None


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; x [..., D], weight [D] -> [..., D] in the dtype of x.

    rms(x) = sqrt(mean(x^2) + eps), computed in at least float32 (arXiv 1910.07467).
    """
    y: Tensor = _RmsNorm.apply(x, weight, eps)
    return y


class _SwiGLU(torch.autograd.Function):
    """Keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        dgate = dup = None
        if ctx.needs_input_grad[0]:
            dgate = torch.ops.aten.silu_backward(dy * up, gate)
        if ctx.needs_input_grad[1]:
            dup = functional.silu(gate).mul_(dy)
        return dgate, dup


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202); both [..., F], as the result."""
    y: Tensor = _SwiGLU.apply(gate, up)
    return y
