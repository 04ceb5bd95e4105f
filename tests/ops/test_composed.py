"""The composed op against the written-out formula, on every kind of support, and what it keeps alive."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sltrain_dist.ops import composed
from sltrain_dist.params.support import Support

KINDS = ["fan_in", "uniform", "block", "block_transposed"]


def problem(kind, out=96, in_=64, rank=5, tokens=(3, 7), dtype=torch.float64, scaling=False):
    """Fresh random inputs and the matrix S they stand for."""
    block = (4 if out > 8 else 2) if kind.startswith("block") else 1
    density = 0.125 if out > 8 else 0.25
    support = Support.plan(
        kind.removesuffix("_transposed"),
        (out, in_),
        density,
        block=block,
        transposed="trans" in kind,
    )
    count = torch.Size(support.offsets_shape).numel()
    offsets = support.offsets(torch.randint(1000, ()).item(), "layer", 0, count)
    leaves = {
        "x": torch.randn(*tokens, in_, dtype=dtype),
        "b": torch.randn(out, rank, dtype=dtype),
        "a": torch.randn(rank, in_, dtype=dtype),
        "values": torch.randn(support.values_shape, dtype=dtype),
        "bias": torch.randn(out, dtype=dtype),
    }
    if scaling:
        leaves["scaling"] = torch.randn(1, dtype=dtype)
    for leaf in leaves.values():
        leaf.requires_grad_()
    return support, offsets.view(support.offsets_shape), leaves


def sparse_matrix(support, offsets, values):
    """S by a loop over every block: the definition, independent of the views under test."""
    tiles = support.tiles
    if values.dim() == 1:
        flat = torch.zeros(support.shape, dtype=values.dtype).view(-1)
        return flat.index_put((offsets.long(),), values).view(support.shape)
    rows, columns, positions = [], [], []
    for n in range(offsets.shape[0]):
        for c in range(offsets.shape[1]):
            for k in range(offsets.shape[2]):
                offset = int(offsets[n, c, k])
                along_in = tiles.tile_out == tiles.block
                top = n * tiles.tile_out + (0 if along_in else offset * tiles.block)
                left = c * tiles.tile_in + (offset * tiles.block if along_in else 0)
                for e in range(tiles.block**2):
                    rows.append(top + e // tiles.block)
                    columns.append(left + e % tiles.block)
                    positions.append((n, c, k, e))
    index = (torch.tensor(rows), torch.tensor(columns))
    return torch.zeros(support.shape, dtype=values.dtype).index_put(
        index, torch.stack([values[p] for p in positions])
    )


def formula(support, offsets, leaves, scale):
    s = torch.tanh(leaves["scaling"]) if "scaling" in leaves else scale
    w = s * (leaves["b"] @ leaves["a"]) + sparse_matrix(support, offsets, leaves["values"])
    return leaves["x"] @ w.t() + leaves["bias"]


def ours(support, offsets, leaves, scale):
    return composed.sltrain_linear(
        leaves["x"],
        (leaves["b"], leaves["a"]),
        leaves["values"],
        offsets,
        leaves["bias"],
        leaves.get("scaling"),
        scale,
        support.tiles,
    )


@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_formula(kind, scaling):
    support, offsets, leaves = problem(kind, scaling=scaling)
    expected = formula(support, offsets, leaves, 0.37)
    dy = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, list(leaves.values()), dy)
    actual = ours(support, offsets, leaves, 0.37)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, list(leaves.values()), dy), wanted)


@pytest.mark.parametrize("kind", ["fan_in", "uniform"])
def test_panels_cover_tall_matrices(kind):
    """More rows than one panel of dW: dA sums over panels, dB and dvalues fill all of them."""
    support, offsets, leaves = problem(kind, out=700, in_=24, rank=3)
    expected = formula(support, offsets, leaves, 2.0)
    wanted = torch.autograd.grad(expected.square().sum(), list(leaves.values()))
    actual = ours(support, offsets, leaves, 2.0).square().sum()
    torch.testing.assert_close(torch.autograd.grad(actual, list(leaves.values())), wanted)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("kind", KINDS)
def test_lower_precision(kind, dtype, tolerance):
    support, offsets, leaves = problem(kind, dtype=dtype)
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    expected = formula(support, offsets, exact, 0.5)
    wanted = torch.autograd.grad(expected.sum(), list(exact.values()))
    actual = ours(support, offsets, leaves, 0.5)
    assert actual.dtype == dtype
    got = torch.autograd.grad(actual.sum(), list(leaves.values()))
    for found, right in zip([actual, *got], [expected, *wanted], strict=True):
        assert (found.double() - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, scaling):
    support, offsets, leaves = problem(kind, out=8, in_=16, rank=2, tokens=(3,), scaling=scaling)
    names = list(leaves)

    def function(*tensors):
        return ours(support, offsets, dict(zip(names, tensors, strict=True)), 0.7)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind, scaling):
    support, offsets, leaves = problem(kind, out=8, in_=16, rank=2, scaling=scaling)
    tiles = support.tiles
    arguments = (*(leaves[name] for name in ("x", "b", "a", "values")), offsets)
    constants = (0.5, tiles.tile_out, tiles.tile_in, tiles.block)
    scale = leaves.get("scaling")
    torch.library.opcheck(composed.composed_linear, (*arguments, leaves["bias"], scale, *constants))
    plain = tuple(tensor.detach() for tensor in arguments)
    dy = torch.randn(3, 7, 8, dtype=torch.float64)
    torch.library.opcheck(
        composed.composed_linear_backward,
        (
            dy,
            *plain,
            None if scale is None else scale.detach(),
            *constants,
            [True, True, True, True, scaling],
        ),
    )


def test_sparse_alone():
    """Without factors W = S: the path of dropout on the low-rank input."""
    support, offsets, leaves = problem("fan_in")
    s = sparse_matrix(support, offsets, leaves["values"])
    y = composed.sltrain_linear(
        leaves["x"], None, leaves["values"], offsets, None, None, 0.0, support.tiles
    )
    torch.testing.assert_close(y, leaves["x"] @ s.t())
    expected = torch.autograd.grad((leaves["x"] @ s.t()).square().sum(), leaves["values"])
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), leaves["values"]), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_saves_only_its_inputs(kind):
    """The reference keeps a scaled copy of A per layer (2.3 GB at 7B); we keep the leaves themselves."""
    support, offsets, leaves = problem(kind, scaling=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(support, offsets, leaves, 0.5)
    allowed = {leaves[n].data_ptr(): n for n in ("x", "b", "a", "values", "scaling")}
    allowed[offsets.data_ptr()] = "offsets"
    names = sorted(allowed[tensor.data_ptr()] for tensor in saved)
    assert names == ["a", "b", "offsets", "scaling", "values", "x"]
    assert all(t.shape in {leaf.shape for leaf in leaves.values()} | {offsets.shape} for t in saved)


def test_compiles_without_graph_breaks():
    support, offsets, leaves = problem("fan_in", dtype=torch.float32)
    compiled = torch.compile(
        lambda tensors: ours(support, offsets, tensors, 0.5).sin(),
        fullgraph=True,
        backend="aot_eager",
    )
    expected = ours(support, offsets, leaves, 0.5).sin()
    torch.testing.assert_close(compiled(leaves), expected)
    wanted = torch.autograd.grad(expected.sum(), list(leaves.values()))
    got = torch.autograd.grad(compiled(leaves).sum(), list(leaves.values()))
    torch.testing.assert_close(got, wanted)


class PeakBytes(TorchDispatchMode):
    """Counts bytes of live storages that operators make, as a memory profiler would."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.follow(tensor.untyped_storage())
        return result

    def follow(self, storage):
        import weakref

        pointer, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or pointer in self.known:
            return
        self.known.add(pointer)
        self.live += size
        self.peak = max(self.peak, self.live)

        def released():
            self.live -= size
            self.known.discard(pointer)

        weakref.finalize(storage, released)


@pytest.mark.parametrize("kind", KINDS)
def test_workspace_is_as_declared(kind):
    """W is released before dW is made, and dW is made in panels: the planner relies on the declared bytes."""
    out, in_, rank = 2048, 512, 32
    support, offsets, leaves = problem(kind, out, in_, rank, tokens=(16,), dtype=torch.float32)
    plain = {name: leaf.detach() for name, leaf in leaves.items()}
    tiles = support.tiles
    declared = composed.workspace_bytes(out, in_, offsets.numel(), tiles, 4, rank)
    arguments = (plain["b"], plain["a"], plain["values"], offsets)
    constants = (0.5, tiles.tile_out, tiles.tile_in, tiles.block)
    before = {t.untyped_storage().data_ptr() for t in [*plain.values(), offsets]}
    with PeakBytes() as forward:
        forward.known |= before
        composed.composed_linear._init_fn(plain["x"], *arguments, None, None, *constants)
    with PeakBytes() as backward:
        backward.known |= before
        composed.composed_linear_backward._init_fn(
            torch.randn(16, out), plain["x"], *arguments, None, *constants, [True] * 4 + [False]
        )
    results = 4 * (16 * in_ + out * rank + rank * in_ + plain["values"].numel()) + 2 * 4 * 16 * out
    w = out * in_ * 4
    assert w < forward.peak <= declared["forward"] + results
    assert w < backward.peak <= declared["backward"] + results
    assert backward.peak < 1.9 * w, "W and dW were alive together"


def test_flops_are_counted():
    """6 n out in + 8 r out in for forward and backward, as the planner and MFU assume."""
    out, in_, rank, n = 96, 64, 5, 21
    support, offsets, leaves = problem("fan_in", out, in_, rank, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        ours(support, offsets, leaves, 0.5).sum().backward()
    assert counter.get_total_flops() == 6 * n * out * in_ + 8 * rank * out * in_


def test_bad_inputs_are_named():
    support, offsets, leaves = problem("fan_in")
    with pytest.raises(ValueError, match="x has 63 features"):
        ours(support, offsets, leaves | {"x": torch.randn(2, 63, dtype=torch.float64)}, 0.5)
    with pytest.raises(TypeError, match="float32"):
        ours(support, offsets, leaves | {"x": torch.randn(2, 64)}, 0.5)
    with pytest.raises(TypeError, match="offsets"):
        ours(support, offsets.double(), leaves, 0.5)
