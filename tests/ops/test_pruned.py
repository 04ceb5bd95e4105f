"""The pruned linear against its formula, written out with dense masks; its gradient of x is not the derivative."""

import pytest
import torch

from sltrain_dist.ops import pruned
from sltrain_dist.ops.pattern import Pattern, are_largest, pack, positions_of_largest, prune_rows
from sltrain_dist.ops.products import Pruned
from tests.ops.test_workspace import PeakBytes

PATTERNS = ["2:4", "2:8", "1:2", "1:4"]


def problem(text, out=None, in_=None, tokens=(3, 7), dtype=torch.float64):
    """Inputs, the dense W they stand for and W pruned twice."""
    pattern = Pattern.parse(text)
    out, in_ = out or 5 * pattern.group, in_ or 24 * pattern.group
    w = torch.randn(out, in_, dtype=dtype)
    keeps = are_largest(w.abs(), pattern)
    places = positions_of_largest(w.abs().view(-1, pattern.group), pattern).view(out, -1)
    offsets, values = pack(places, pattern.bits), w[keeps].view(out, -1)
    twice = keeps & are_largest((w.abs() * keeps).t(), pattern).t()
    mask = prune_rows(values, offsets, pattern)
    inputs = {
        "x": torch.randn(*tokens, in_, dtype=dtype),
        "values": values.clone(),
        "offsets": offsets,
        "backward": mask,
        "bias": torch.randn(out, dtype=dtype),
    }
    for name in ("x", "values", "bias"):
        inputs[name].requires_grad_()
    return pattern, inputs, w * keeps, w * twice, keeps


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_formula(text, dtype):
    pattern, inputs, w, twice, keeps = problem(text, dtype=dtype)
    y = pruned.pruned_linear(*inputs.values(), pattern.kept, pattern.group)
    dy = torch.randn_like(y)
    y.backward(dy)
    wide = torch.promote_types(dtype, torch.float32)
    x2, dy2 = inputs["x"].detach().to(wide).flatten(0, 1), dy.to(wide).flatten(0, 1)
    close = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
    expected = inputs["x"].to(wide) @ w.to(wide).t() + inputs["bias"].to(wide)
    torch.testing.assert_close(y.to(wide), expected, **close)
    dx = (dy2 @ twice.to(wide)).view(inputs["x"].shape)
    torch.testing.assert_close(inputs["x"].grad.to(wide), dx, **close)
    dvalues = (dy2.t() @ x2)[keeps].view(inputs["values"].shape)
    torch.testing.assert_close(inputs["values"].grad.to(wide), dvalues, **close)
    torch.testing.assert_close(inputs["bias"].grad.to(wide), dy2.sum(0), **close)


def test_the_gradient_of_x_is_no_derivative():
    """What is dropped is dropped: with all bits set it is the derivative, with the second mask it is another."""
    pattern, inputs, w, twice, _ = problem("2:4")
    assert not torch.equal(w, twice)
    sizes = (pattern.kept, pattern.group)

    def run(x, values, bias):
        everything = torch.full_like(inputs["backward"], 255)
        return pruned.pruned_linear(x, values, inputs["offsets"], everything, bias, *sizes)

    assert torch.autograd.gradcheck(run, (inputs["x"], inputs["values"], inputs["bias"]))


@pytest.mark.parametrize(("out", "in_"), [(3, 16), (260, 48), (1, 16), (517, 16)])
def test_odd_shapes_and_panels(out, in_):
    """The product itself needs no whole groups of rows; more than 256 rows are several panels."""
    pattern = Pattern.parse("2:4")
    values = torch.randn(out, in_ // 2, dtype=torch.float64, requires_grad=True)
    places = torch.rand(out * in_ // 4, 4).argsort(1)[:, :2].sort(1).values.view(out, -1)
    offsets, mask = pack(places, 2), torch.randint(256, (out, in_ // 16), dtype=torch.uint8)
    column = places + torch.arange(in_ // 2) // 2 * 4
    w = torch.zeros(out, in_, dtype=torch.float64).scatter(1, column, values)
    bits = torch.stack([mask >> i & 1 for i in range(8)], -1).flatten(1)
    twice = torch.zeros(out, in_, dtype=torch.float64).scatter(1, column, values * bits)
    x = torch.randn(2, in_, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, out, dtype=torch.float64)
    y = pruned.pruned_linear(x, values, offsets, mask, None, 2, 4)
    y.backward(dy)
    torch.testing.assert_close(y, x @ w.t())
    torch.testing.assert_close(x.grad, dy @ twice)
    torch.testing.assert_close(values.grad, (dy.t() @ x).gather(1, column))
    assert torch.equal(pruned.compose(values, offsets, pattern), w)


@pytest.mark.parametrize("text", PATTERNS)
def test_opcheck(text):
    pattern, inputs, *_ = problem(text, dtype=torch.float32)
    sizes = (pattern.kept, pattern.group)
    for bias in (inputs["bias"], None):
        arguments = (*list(inputs.values())[:4], bias, *sizes)
        torch.library.opcheck(pruned.pruned_linear, arguments)
    plain = [tensor.detach() for tensor in list(inputs.values())[:4]]
    dy = torch.randn(3, 7, inputs["values"].shape[0])
    for needs in ([True, True], [False, True], [True, False]):
        torch.library.opcheck(pruned.pruned_linear_backward, (dy, *plain, *sizes, needs))


def test_compiles_without_a_break():
    pattern, inputs, *_ = problem("2:4", dtype=torch.float32)

    def run(*tensors):
        return torch.tanh(pruned.pruned_linear(*tensors, pattern.kept, pattern.group)).sum()

    expected = torch.autograd.grad(run(*inputs.values()), (inputs["x"], inputs["values"]))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*inputs.values()), (inputs["x"], inputs["values"]))
    torch.testing.assert_close(found, expected)


def test_nothing_but_inputs_is_kept():
    pattern, inputs, *_ = problem("2:4")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        pruned.pruned_linear(*inputs.values(), pattern.kept, pattern.group)
    own = {tensor.data_ptr() for tensor in inputs.values()}
    assert {tensor.data_ptr() for tensor in kept} <= own


@pytest.mark.parametrize("need_x", [True, False])
def test_product_is_the_operator(need_x):
    pattern, inputs, *_ = problem("2:8")
    tensors = {name: inputs[name].detach() for name in ("values", "offsets", "backward")}
    product, x = Pruned(pattern), inputs["x"].detach()
    y, hidden = product.forward(x, tensors, True)
    inputs["bias"] = None
    expected = pruned.pruned_linear(*inputs.values(), pattern.kept, pattern.group)
    assert hidden is None
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    expected.backward(dy)
    dx, grads = product.backward(dy, x, tensors, None, need_x)
    assert (dx is not None) == need_x
    assert dx is None or torch.equal(dx, inputs["x"].grad)
    assert torch.equal(grads["values"], inputs["values"].grad)


def test_workspace_is_as_declared():
    """W is released before dW is made, and dW is made in panels."""
    out, in_ = 2048, 512
    pattern, inputs, *_ = problem("2:4", out, in_, tokens=(16,), dtype=torch.float32)
    declared = pruned.workspace_bytes(out, in_, pattern, 4)
    plain = {name: t.detach() for name, t in inputs.items()}
    before = {t.untyped_storage().data_ptr() for t in plain.values()}
    x, *weight, _ = plain.values()
    with PeakBytes() as forward:
        forward.known |= before
        pruned.pruned_linear._init_fn(x, *weight, None, 2, 4)
    with PeakBytes() as backward:
        backward.known |= before
        dy = torch.randn(16, out)
        pruned.pruned_linear_backward._init_fn(dy, x, *weight, 2, 4, [True, True])
    results = 4 * (16 * in_ + plain["values"].numel() + 2 * 16 * out)
    w = out * in_ * 4
    assert w < forward.peak <= declared["forward"] + results
    assert w < backward.peak <= declared["backward"] + results
    assert backward.peak < 1.9 * w, "W and dW were alive together"
