"""Both paths of the linear against the written-out formula, on every kind of support, and what they keep alive."""

from dataclasses import astuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sltrain_dist.ops import composed, factorized
from sltrain_dist.ops.linear import PATHS
from tests.ops.problem import KINDS, formula, ours, problem

pytestmark = pytest.mark.parametrize("path", list(PATHS))


def compare(support, offsets, leaves, scale, path, **tolerances):
    """Of the factorized path with h kept and with h computed again."""
    compare_one(support, offsets, leaves, scale, path, False, **tolerances)
    if path == "factorized":
        compare_one(support, offsets, leaves, scale, path, True, **tolerances)


def compare_one(support, offsets, leaves, scale, path, keep_hidden, **tolerances):
    """Output and gradients of a path against the formula in float64."""
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    expected = formula(support, offsets, exact, scale)
    dy = torch.randn_like(expected)
    wanted = [expected, *torch.autograd.grad(expected, list(exact.values()), dy)]
    actual = ours(support, offsets, leaves, scale, path, keep_hidden)
    dtype = leaves["x"].dtype
    assert actual.dtype == dtype
    grads = torch.autograd.grad(actual, list(leaves.values()), dy.to(dtype))
    names = ["y", *leaves]
    for name, found, right in zip(names, [actual, *grads], wanted, strict=True):
        assert found.shape == right.shape, name
        assert found.dtype == dtype, name
        error = (found.double() - right).norm()
        assert error <= tolerances.get("tolerance", 1e-12) * right.norm(), (name, error)


@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_formula(kind, scaling, path):
    compare(*problem(kind, scaling=scaling), 0.37, path)


@pytest.mark.parametrize("kind", ["fan_in", "uniform"])
def test_panels_cover_tall_matrices(kind, path):
    """More rows than one panel of dW: dA sums over panels, dB and dvalues fill all of them."""
    compare(*problem(kind, out=700, in_=24, rank=3), 2.0, path)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("kind", KINDS)
def test_lower_precision(kind, dtype, tolerance, path):
    compare(*problem(kind, dtype=dtype), 0.5, path, tolerance=tolerance)


@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, scaling, path):
    support, offsets, leaves = problem(kind, out=8, in_=16, rank=2, tokens=(3,), scaling=scaling)
    names = list(leaves)

    def function(*tensors):
        return ours(support, offsets, dict(zip(names, tensors, strict=True)), 0.7, path)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "scaling"), [(KINDS[0], True), (KINDS[1], False), (KINDS[2], True), (KINDS[3], False)]
)
def test_opcheck(kind, scaling, dtype, path):
    support, offsets, leaves = problem(kind, out=8, in_=16, rank=2, scaling=scaling, dtype=dtype)
    tiles = support.tiles
    arguments = (*(leaves[name] for name in ("x", "b", "a", "values")), offsets)
    constants = (0.5, tiles.tile_out, tiles.tile_in, tiles.block)
    scale = leaves.get("scaling")
    plain = tuple(tensor.detach() for tensor in arguments)
    dy = torch.randn(3, 7, 8, dtype=dtype)
    frozen = None if scale is None else scale.detach()
    needs = [True, True, True, True, scaling]
    forward = (*arguments, leaves["bias"], scale, *constants)
    if path == "composed":
        torch.library.opcheck(composed.composed_linear, forward)
        backward = (dy, *plain, frozen, *constants, needs)
        torch.library.opcheck(composed.composed_linear_backward, backward)
        return
    for keep_hidden in (False, True):
        torch.library.opcheck(factorized.factorized_linear, (*forward, keep_hidden))
        hidden = torch.randn(21, 2, dtype=dtype) if keep_hidden else None
        backward = (dy, *plain, hidden, frozen, *constants, needs)
        torch.library.opcheck(factorized.factorized_linear_backward, backward)


@pytest.mark.parametrize("needed", ["x", "b", "a", "values", "scaling"])
def test_each_gradient_alone(needed, path):
    """A frozen parameter gets no gradient and does not disturb the others'."""
    support, offsets, leaves = problem("fan_in", scaling=True)
    wanted = torch.autograd.grad(formula(support, offsets, leaves, 0.5).sum(), leaves[needed])
    frozen = {name: leaf.detach() for name, leaf in leaves.items()} | {needed: leaves[needed]}
    got = torch.autograd.grad(ours(support, offsets, frozen, 0.5, path).sum(), leaves[needed])
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [(1,), (0,), (2, 0), (1, 17), (129,)])
def test_any_number_of_tokens(tokens, dtype, path):
    if 0 in tokens:
        support, offsets, leaves = problem("fan_in", tokens=tokens, dtype=dtype)
        y = ours(support, offsets, leaves, 0.5, path)
        assert y.shape == (*tokens, 96)
        grads = torch.autograd.grad(y.sum(), list(leaves.values()))
        assert all(not grad.any() for grad in grads)
        return
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    compare(*problem("fan_in", tokens=tokens, dtype=dtype), 0.5, path, tolerance=tolerance)


@pytest.mark.parametrize("kind", ["fan_in", "uniform", "block"])
@pytest.mark.parametrize(("out", "in_"), [(5472, 64), (64, 1728), (1368, 64), (64, 1368)])
def test_odd_shapes(out, in_, kind, path):
    """The physical widths of 1b, 100m and 71m (5461, 1708 and 1368 before padding)."""
    inputs = problem(kind, out=out, in_=in_, rank=3, tokens=(5,), dtype=torch.float32)
    compare(*inputs, 0.5, path, tolerance=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_inputs(kind, path):
    """x and dy that are views with gaps, transposed, or expanded."""
    support, offsets, leaves = problem(kind, tokens=(6, 4))
    x = leaves["x"].detach()
    views = [
        torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x[:1].expand(6, 4, -1),
    ]
    for view in views:
        assert not view.is_contiguous()
        compare(support, offsets, leaves | {"x": view.requires_grad_()}, 0.5, path)


def test_sparse_alone(path):
    """Without factors W = S: the path of dropout on the low-rank input."""
    support, offsets, leaves = problem("fan_in")
    leaves = {name: leaves[name] for name in ("x", "values")}
    compare(support, offsets, leaves, 0.0, path)


@pytest.mark.parametrize("kind", KINDS)
def test_saves_only_its_inputs(kind, path):
    """The reference keeps a scaled copy of A per layer (2.3 GB at 7B); we keep the leaves themselves."""
    support, offsets, leaves = problem(kind, scaling=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(support, offsets, leaves, 0.5, path, keep_hidden=False)
    allowed = {leaves[n].data_ptr(): n for n in ("x", "b", "a", "values", "scaling")}
    allowed[offsets.data_ptr()] = "offsets"
    names = sorted(allowed[tensor.data_ptr()] for tensor in saved)
    assert names == ["a", "b", "offsets", "scaling", "values", "x"]
    assert all(t.shape in {leaf.shape for leaf in leaves.values()} | {offsets.shape} for t in saved)


def test_keeps_h_beside_them_where_asked(path):
    """And only then, and only for backward: r numbers a token."""
    support, offsets, leaves = problem("fan_in", rank=5)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(support, offsets, leaves, 0.5, path, keep_hidden=True)
    assert len(saved) == (6 if path == "factorized" else 5)
    assert ((21, 5) in {tuple(tensor.shape) for tensor in saved}) == (path == "factorized")
    with torch.no_grad():
        _, hidden = factorized.factorized_linear(
            *(leaves[name] for name in ("x", "b", "a", "values")), offsets, None, None, 0.5,
            *astuple(support.tiles), False,
        )  # fmt: skip
    assert hidden.numel() == 0


def test_compiles_without_graph_breaks(path):
    support, offsets, leaves = problem("fan_in", dtype=torch.float32)
    compiled = torch.compile(
        lambda tensors: ours(support, offsets, tensors, 0.5, path).sin(),
        fullgraph=True,
        backend="aot_eager",
    )
    expected = ours(support, offsets, leaves, 0.5, path).sin()
    torch.testing.assert_close(compiled(leaves), expected)
    wanted = torch.autograd.grad(expected.sum(), list(leaves.values()))
    got = torch.autograd.grad(compiled(leaves).sum(), list(leaves.values()))
    torch.testing.assert_close(got, wanted)


def test_flops_are_counted(path):
    """As the planner and MFU assume, plus h a second time on the factorized path."""
    out, in_, rank, n = 96, 64, 5, 21
    support, offsets, leaves = problem("fan_in", out, in_, rank, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        ours(support, offsets, leaves, 0.5, path, keep_hidden=False).sum().backward()
    support_size = leaves["values"].numel()
    assert (
        counter.get_total_flops()
        == {
            "composed": 6 * n * out * in_ + 8 * rank * out * in_,
            "factorized": 6 * n * rank * (out + in_) + 2 * n * rank * in_ + 6 * n * support_size,
        }[path]
    )


def test_bad_inputs_are_named(path):
    support, offsets, leaves = problem("fan_in")
    with pytest.raises(ValueError, match="x has 63 features"):
        ours(support, offsets, leaves | {"x": torch.randn(2, 63, dtype=torch.float64)}, 0.5, path)
    with pytest.raises(TypeError, match="float32"):
        ours(support, offsets, leaves | {"x": torch.randn(2, 64)}, 0.5, path)
    with pytest.raises(TypeError, match="offsets"):
        ours(support, offsets.double(), leaves, 0.5, path)
