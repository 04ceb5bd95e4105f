"""The Triton kernels against the formula in float64: under the interpreter, or on a GPU where one is.

Not collected by name, because Triton decides at its import whether it interprets: test_block_triton.py runs
this file in a process of its own. On a GPU: python -m pytest tests/ops/block_triton_cases.py
"""

import os

import numpy
import pytest
import torch

from sltrain_dist.ops import block_triton
from sltrain_dist.ops.tiles import Tiles
from sltrain_dist.params.support import Support
from tests.ops.problem import sparse_matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.012}
if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def multiply_bfloat16(self, a, b, *rest):
        """The interpreter keeps bfloat16 as uint16 and multiplies those bits as integers (Triton 3.7)."""
        for handle in (a, b):
            if handle.data.dtype == numpy.uint16:
                handle.data = (handle.data.astype(numpy.uint32) << 16).view(numpy.float32)
        return multiply(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = multiply_bfloat16

NAMES = ["dx", "db", "da", "dvalues", "dscaling"]


def problem(block, transposed, tokens, rank, dtype, scaling, grid=(3, 5)):
    """Random inputs (rank 0: no factors) and the support of a matrix of ``grid`` blocks."""
    plan = Support.plan(
        "block",
        (grid[0] * block, grid[1] * block),
        0.34 if transposed else 0.2,
        block=block,
        transposed=transposed,
    )
    count = torch.Size(plan.offsets_shape).numel()
    offsets = plan.offsets(torch.randint(1000, ()).item(), "layer", 0, count)
    out, in_ = plan.shape
    tensors = {
        "x": torch.randn(*tokens, in_),
        "b": torch.randn(out, rank) if rank else None,
        "a": torch.randn(rank, in_) if rank else None,
        "values": torch.randn(plan.values_shape),
        "bias": torch.randn(out),
        "scaling": torch.randn(1) if scaling else None,
        "dy": torch.randn(*tokens, out),
    }
    return (
        plan,
        offsets.view(plan.offsets_shape),
        {name: None if tensor is None else tensor.to(dtype) for name, tensor in tensors.items()},
    )


def formula(plan, offsets, tensors, scale):
    """y and the gradients of x, b, a, values, scaling by float64 autograd; None where there is no input."""
    exact = {
        name: None if tensor is None else tensor.double().requires_grad_()
        for name, tensor in tensors.items()
    }
    s = scale if exact["scaling"] is None else torch.tanh(exact["scaling"])
    w = sparse_matrix(plan, offsets, exact["values"])
    if exact["b"] is not None:
        w = w + s * (exact["b"] @ exact["a"])
    y = exact["x"] @ w.t() + exact["bias"]
    leaves = [exact[name] for name in ("x", "b", "a", "values", "scaling")]
    used = [leaf for leaf in leaves if leaf is not None]
    grads = iter(torch.autograd.grad(y, used, exact["dy"].detach(), allow_unused=True))
    return y.detach(), [None if leaf is None else next(grads) for leaf in leaves]


def run(plan, offsets, tensors, scale, needs, fused=None, keep=False):
    tiles = plan.tiles
    x, b, a, values, bias, scaling, dy = (
        None if tensor is None else tensor.to(DEVICE) for tensor in tensors.values()
    )
    offsets = offsets.to(DEVICE)
    sizes = (scale, tiles.tile_out, tiles.tile_in, tiles.block)
    y, hidden = block_triton.forward(
        x, b, a, values, offsets, bias, scaling, *sizes, keep_hidden=keep, fused=fused
    )
    kept = hidden if keep else None
    grads = block_triton.backward(
        dy, x, b, a, values, offsets, kept, scaling, *sizes, needs, fused=fused
    )
    return y.cpu(), [grad.cpu() for grad in grads]


def assert_near(found, right, dtype, name):
    assert found.shape == right.shape, name
    assert found.dtype == dtype, name
    error = (found.double() - right).norm()
    alone = (
        10 if found.numel() == 1 else 1
    )  # one sum of many products: nothing averages its rounding
    assert error <= alone * TOLERANCE[dtype] * right.norm(), f"{name}: {error / right.norm():.2e}"


def check(plan, offsets, tensors, scale=0.37, fused=None):
    low_rank = tensors["b"] is not None
    needs = [True, low_rank, low_rank, True, tensors["scaling"] is not None and low_rank]
    y, grads = run(plan, offsets, tensors, scale, needs, fused)
    right, wanted = formula(plan, offsets, tensors, scale)
    dtype = tensors["x"].dtype
    assert_near(y, right, dtype, "y")
    for name, need, grad, want in zip(NAMES, needs, grads, wanted, strict=True):
        if need:
            assert_near(grad, want, dtype, name)
        else:
            assert grad.numel() == 0, name


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("block", [16, 32])
def test_equals_the_formula(block, transposed, dtype, fused):
    """Rows, rank and rank chunks that divide nothing."""
    grid = (3, 10) if block == 16 else (3, 5)
    check(*problem(block, transposed, (3, 11), 37, dtype, False, grid), fused=fused)


@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_of_64(transposed):
    check(*problem(64, transposed, (18,), 70, torch.bfloat16, False))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_trained_scale(transposed, fused):
    check(*problem(16, transposed, (19,), 5, torch.float32, True), fused=fused)


@pytest.mark.parametrize("transposed", [False, True])
def test_without_factors(transposed):
    check(*problem(16, transposed, (17,), 0, torch.float32, False))


@pytest.mark.parametrize("tokens", [(1,), (0,), (2, 0, 3), (1, 1, 16)])
def test_few_tokens(tokens):
    check(*problem(16, False, tokens, 3, torch.float32, False))


def test_long_sums_are_cut_and_added(monkeypatch):
    """dvalues over more rows than one program takes."""
    monkeypatch.setattr(block_triton, "PART_ROWS", 32)
    plan, offsets, tensors = problem(16, False, (210,), 4, torch.bfloat16, False, (2, 5))
    check(plan, offsets, tensors)


@pytest.mark.parametrize("transposed", [False, True])
def test_several_windows_of_several_blocks(transposed):
    """k > 1 and more than one tile along the windows: the order of values within a group matters."""
    tiles = Tiles(64, 16, 16) if transposed else Tiles(16, 64, 16)
    grid = (2, 8) if transposed else (8, 2)
    offsets = torch.stack([torch.randperm(4)[:2].sort().values for _ in range(16)])
    plan = Support("block", (128, 128), (128, 128), tiles, 2)
    tensors = {
        "x": torch.randn(9, 128),
        "b": torch.randn(128, 6),
        "a": torch.randn(6, 128),
        "values": torch.randn(*grid, 2, 256),
        "bias": torch.randn(128),
        "scaling": None,
        "dy": torch.randn(9, 128),
    }
    check(plan, offsets.view(*grid, 2).to(torch.uint8), tensors)


def test_strided_inputs():
    """x a slice and a transpose, dy expanded from one number, as y.sum().backward() gives."""
    plan, offsets, tensors = problem(16, False, (12,), 4, torch.float32, False)
    out, in_ = plan.shape
    tensors["x"] = torch.randn(12, 2 * in_)[:, in_:]
    tensors["dy"] = torch.ones(()).expand(12, out)
    check(plan, offsets, tensors)
    tensors["x"] = torch.randn(in_, 12).t()
    tensors["b"] = torch.randn(4, out).t()
    check(plan, offsets, tensors, fused=True)
    check(plan, offsets, tensors, fused=False)


@pytest.mark.parametrize("needed", range(5))
def test_only_what_is_needed(needed):
    plan, offsets, tensors = problem(16, True, (7,), 3, torch.float32, True)
    needs = [i == needed for i in range(5)]
    _, grads = run(plan, offsets, tensors, 0.5, needs)
    _, wanted = formula(plan, offsets, tensors, 0.5)
    for i, (grad, want) in enumerate(zip(grads, wanted, strict=True)):
        if i == needed:
            assert_near(grad, want, torch.float32, NAMES[i])
        else:
            assert grad.numel() == 0


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_block_list_holds_every_block_once(transposed, by_rows):
    plan, offsets, _ = problem(16, transposed, (1,), 0, torch.float32, False, (12, 10))
    groups = plan.shape[0 if by_rows else 1] // 16
    found = block_triton.block_list(offsets, plan.tiles, by_rows, groups)
    assert found.pointer.dtype == found.partner.dtype == found.slot.dtype == torch.int32
    assert sorted(found.slot.tolist()) == list(range(offsets.numel()))
    numbers = torch.arange(1.0, 1 + offsets.numel()).repeat_interleave(256)
    dense = sparse_matrix(plan, offsets, numbers.view(plan.values_shape))[::16, ::16]
    rebuilt = torch.zeros_like(dense if by_rows else dense.t())
    for group in range(groups):
        for entry in range(*found.pointer[group : group + 2].tolist()):
            rebuilt[group, found.partner[entry]] = found.slot[entry] + 1
    assert torch.equal(rebuilt if by_rows else rebuilt.t(), dense)


def test_which_products_are_taken():
    values = torch.zeros(2, 2, 1, 256)
    tiles = Tiles(16, 32, 16)
    assert block_triton.supported(torch.zeros(1), values, tiles)
    assert not block_triton.supported(torch.zeros(1, dtype=torch.float64), values, tiles)
    assert not block_triton.supported(torch.zeros(1), values, Tiles(8, 32, 8))
    assert not block_triton.supported(torch.zeros(1), torch.zeros(7), Tiles(16, 32, 1))
