"""In which format products are computed: bfloat16 on a CPU without matrix units widens to float32.

Measured on an AVX2 machine, 1024 tokens, 512 -> 1376: dy @ W takes 8 ms in float32 and 1.7 s in
bfloat16, and widening both ways adds a few per cent. Results are rounded to bfloat16 once, at the end. CPUs with bfloat16 units use those, and round every product.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@functools.cache
def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in units of its own (AVX512_BF16, with or without AMX)."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and bool(supported())


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products with ``x`` are computed; csrc/cpu/factorized.cpp decides alike."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not native_bfloat16():
        return torch.float32
    return x.dtype


def widened(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in ``dtype``; None stays None."""
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


class _WideLinear(torch.autograd.Function):
    """x W^T computed in float32 from bfloat16 inputs; saves the inputs themselves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        dy2 = dy.reshape(-1, dy.shape[-1]).float()
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = (dy2 @ weight.float()).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight = (dy2.t() @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype)
        return dx, dweight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, widened where `compute_dtype` says so.

    x [..., in], weight [out, in], bias [out] or None -> [..., out].
    """
    if compute_dtype(x) == x.dtype:
        return functional.linear(x, weight, bias)
    y: Tensor = _WideLinear.apply(x, weight)
    return y if bias is None else y + bias
