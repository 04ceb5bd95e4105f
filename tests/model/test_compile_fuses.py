"""torch.compile makes one kernel of RMSNorm and one of SwiGLU, so csrc/cuda holds none of its own.

Counted in the code that Inductor generates, here for the CPU or, where one is, for the GPU. (Its own count
of kernels counts the loop nests inside of one.)
"""

import re
import shutil

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from sltrain_dist.model.backends import NORM
from sltrain_dist.ops.pointwise import swiglu

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rms_norm(x, weight, residual):
    """With the residual sum before it, as a block has it; both are results."""
    total = x + residual
    return NORM["torch"](total, weight, 1e-6), total


def generated(function, *inputs):
    """Kernels in forward and in backward; results are eager's."""

    def both(run):
        results = run(*inputs)
        first = results[0] if isinstance(results, tuple) else results
        return results, torch.autograd.grad(first.float().square().sum(), inputs)

    torch.compiler.reset()
    found, codes = run_and_get_code(both, torch.compile(function, fullgraph=True))
    torch.testing.assert_close(found, both(function), rtol=0.05, atol=0.05)
    return [len(re.findall(r"= async_compile\.\w+\(", code)) for code in codes]


def draw(*shapes):
    return [
        torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for shape in shapes
    ]


def test_rms_norm():
    """Backward may take a second and a third: the weight's gradient is a sum over the tokens."""
    forward, backward = generated(rms_norm, *draw((48, 64), 64, (48, 64)))
    assert forward == 1
    assert backward <= 3


def test_swiglu():
    assert generated(swiglu, *draw((48, 64), (48, 64))) == [1, 1]
