"""RMSNorm and SwiGLU against torch's: forward to the bit, gradients, and gradcheck."""

import pytest
import torch
from torch.nn import functional

from sltrain_dist.ops.pointwise import rms_norm, swiglu


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def torch_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def our_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, weight, 1e-6)


def torch_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return functional.silu(gate) * up


PAIRS = {
    "rms_norm": (our_norm, torch_norm, ((3, 5, 16), (16,))),
    "swiglu": (swiglu, torch_swiglu, ((3, 5, 16), (3, 5, 16))),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_torch(name: str, dtype: torch.dtype) -> None:
    ours, theirs, shapes = PAIRS[name]
    inputs = [draw(*shape, dtype=dtype) for shape in shapes]
    found, expected = ours(*inputs), theirs(*inputs)
    assert torch.equal(found, expected)
    dy = draw(*found.shape, dtype=dtype).detach()
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip(
        torch.autograd.grad(found, inputs, dy),
        torch.autograd.grad(expected, inputs, dy),
        strict=True,
    ):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_of_float64(name: str) -> None:
    ours, _, shapes = PAIRS[name]
    inputs = [draw(*shape) for shape in shapes]
    assert torch.autograd.gradcheck(ours, inputs)
    for index in range(2):  # and where only one of them is trained
        partly = [t.detach().requires_grad_(i == index) for i, t in enumerate(inputs)]
        assert torch.autograd.gradcheck(ours, partly)
