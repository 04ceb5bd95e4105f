"""One cut linear, and one cut vocabulary, against the whole one: outputs and every gradient, on 2 and 4 ranks.

A curve that differs says that something is wrong; these tests say which product or which gradient.
"""

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sltrain_dist.config import MethodConfig
from sltrain_dist.ops.cross_entropy import linear_cross_entropy
from sltrain_dist.parallel.engine import as_dtensor
from sltrain_dist.parallel.linear import Region, parallelize_linear
from sltrain_dist.parallel.mesh import Mesh
from sltrain_dist.parallel.tensor import SEQUENCE, TensorParallel
from sltrain_dist.parallel.vocabulary import ParallelVocabulary
from sltrain_dist.params import ParameterizedLinear, make_linear
from sltrain_dist.params.initial import Random
from sltrain_dist.params.linears import SLTrain
from tests.parallel import tiny
from tests.ranks import run_ranks

SEED, BATCH, POSITIONS, WIDTH = 5, 3, 8, 64
METHODS = {
    "full": MethodConfig(method="full"),
    "low_rank": MethodConfig(method="low_rank", rank=8, alpha=4.0),
    "fan_in": MethodConfig(rank=8, density=0.125, alpha=4.0),
    "block": MethodConfig(rank=8, density=0.125, alpha=4.0, support="block", block_size=4),
    "slope": MethodConfig(method="slope"),
    "slope 2:8": MethodConfig(method="slope", pattern="2:8"),
    "trained scale": MethodConfig(rank=12, density=0.125, train_scaling=True),
}


def make(method: MethodConfig, row: bool, path: str, dtype: torch.dtype) -> ParameterizedLinear:
    """64 x 90 (padded to 96) or 90 (96) x 64, with bias, uninitialised."""
    sizes: dict[str, Any] = (
        {"logical_in": 90, "out_features": WIDTH, "in_features": 96}
        if row
        else {"logical_out": 90, "out_features": 96, "in_features": WIDTH}
    )
    parallel = "row" if row else "column"
    linear = make_linear(
        "layer", method=method, bias=True, parallel=parallel, device="cpu", dtype=dtype, **sizes
    )
    if isinstance(linear, SLTrain):
        linear.path = path  # type: ignore[assignment]
    return linear


class Bits:
    """A second mask of mixed bits, from their places alone."""

    def flat(
        self, seed: int, name: str, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        return self.at(seed, name, torch.arange(start, stop))

    def at(self, seed: int, name: str, index: Tensor) -> Tensor:
        return (index * 37 % 256).to(torch.uint8)


def fill(linear: ParameterizedLinear) -> None:
    """Initial values, B and bias random instead of zero; the same on every layout."""
    with torch.no_grad():
        for name, parameter in linear.named_parameters():
            spec = linear.specs[name]
            if name in ("b", "bias"):
                spec = replace(spec, initial=Random("uniform", 0.1, spec.shape, spec.shape))
            if name == "backward":
                spec = replace(spec, initial=Bits())
            flat = spec.flat(SEED, name, 0, parameter.numel())
            parameter.copy_(flat.view(parameter.shape))


def whole_run(
    linear: ParameterizedLinear, x: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    y = linear(x)
    y.backward(dy)
    grads = {name: p.grad for name, p in linear.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return y.detach(), x.grad, grads


def compare(mesh: Mesh, method: MethodConfig, row: bool, path: str, sequence: bool) -> None:
    torch.manual_seed(3)
    dtype = torch.float64
    whole, cut = (make(method, row, path, dtype) for _ in range(2))
    features = (96, WIDTH) if row else (WIDTH, 96)
    x = torch.randn(BATCH, POSITIONS, features[0], dtype=dtype)
    dy = torch.randn(BATCH, POSITIONS, features[1], dtype=dtype)
    fill(whole)
    y, dx, grads = whole_run(whole, x, dy)
    tp = TensorParallel(mesh.tp_group, mesh.tp_rank, mesh.tp_size, sequence, prefetch=True)
    region = Region(tp)
    parallelize_linear(cut, region)
    fill(cut)
    rank, size = mesh.tp_rank, mesh.tp_size

    def positions(tensor: Tensor) -> Tensor:
        return tensor.chunk(size, SEQUENCE)[rank] if sequence else tensor

    if row:
        mine = x.chunk(size, -1)[rank].clone().requires_grad_()
        out = cut(mine)
        torch.testing.assert_close(out, positions(y))
        out.backward(positions(dy))
        torch.testing.assert_close(mine.grad, dx.chunk(size, -1)[rank])
    else:
        mine = positions(x).clone().requires_grad_()
        out = cut(region.enter(mine))
        torch.testing.assert_close(out, y.chunk(size, -1)[rank])
        out.backward(dy.chunk(size, -1)[rank])
        torch.testing.assert_close(mine.grad, positions(dx))
    for name, grad in grads.items():
        local, spec = cut.get_parameter(name).grad, cut.specs[name]
        assert local is not None, name
        expected = grad if spec.cut is None else grad.chunk(size, spec.cut.dim)[rank]
        torch.testing.assert_close(local, expected, msg=lambda m, n=name: f"{n}: {m}")
        joined = as_dtensor(mesh, local, torch.Size(spec.shape), spec.cut)
        assert isinstance(joined, DTensor)
        torch.testing.assert_close(joined.full_tensor(), grad)


def _linears(_: Mesh, tensor_parallel: int) -> int:
    mesh = tiny.arranged(tensor_parallel)
    done = 0
    for method, row, sequence in itertools.product(METHODS.values(), (False, True), (False, True)):
        for path in ("composed", "factorized") if method.method == "sltrain" else ("composed",):
            if make(method, row, path, torch.float64).part_problem(tensor_parallel):
                continue  # 24 of slope's inputs a rank, or 48 under 2:8
            compare(mesh, method, row, path, sequence)
            done += 1
    return done


def test_a_cut_linear_equals_the_whole_one_on_two_ranks() -> None:
    assert run_ranks(_linears, 2, 2) == [38, 38]


def test_a_cut_linear_equals_the_whole_one_on_four_ranks() -> None:
    assert run_ranks(_linears, 4, 4) == [36] * 4


def _kept(_: Mesh) -> list[tuple[int, ...]]:
    """Shapes of all that a column and a row linear of rank 16 keep for backward."""
    mesh = tiny.arranged(2)
    tp = TensorParallel(mesh.tp_group, mesh.tp_rank, mesh.tp_size, True, prefetch=True)
    region, method = Region(tp), MethodConfig(rank=16, density=0.125)
    linears = [make(method, row, "composed", torch.float32) for row in (False, True)]
    for linear in linears:
        parallelize_linear(linear, region)
        fill(linear)
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = torch.randn(1, POSITIONS, WIDTH, requires_grad=True)
        y = linears[1](linears[0](region.enter(x)))
    assert y.shape == (1, POSITIONS, WIDTH)
    y.sum().backward()
    return kept


def test_no_gathered_factor_and_no_gathered_input_is_kept() -> None:
    for kept in run_ranks(_kept, 2):
        assert (16, WIDTH) not in kept, "whole A of the column-parallel linear"
        assert (WIDTH, 16) not in kept, "whole B of the row-parallel linear"
        assert (8, WIDTH) in kept, "its shard"
        assert (WIDTH, 8) in kept, "its shard"
        assert (1, POSITIONS, WIDTH) in kept, "this rank's positions"
        assert (1, 2 * POSITIONS, WIDTH) not in kept, "all positions"


def _vocabulary(_: Mesh, vocab_size: int, rows: int) -> None:
    """Four ranks, the last of which may hold nothing but padding; sequence parallel and not."""
    mesh = tiny.arranged(4)
    generator = torch.Generator().manual_seed(vocab_size)
    weight = torch.randn(rows, WIDTH, generator=generator)
    weight[vocab_size:] = 0
    hidden = torch.randn(BATCH, POSITIONS, WIDTH, generator=generator)
    tokens = torch.randint(vocab_size, (BATCH, POSITIONS), generator=generator)
    labels = torch.randint(vocab_size, (BATCH, POSITIONS), generator=generator)
    labels[0, :5] = -100
    whole_hidden, whole_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_cross_entropy(
        whole_hidden.flatten(0, 1), whole_weight, labels.flatten(), vocab_size
    )
    (loss / 7).backward()
    found = torch.nn.functional.embedding(tokens, whole_weight)
    assert whole_hidden.grad is not None
    assert whole_weight.grad is not None
    for sequence in (False, True):
        tp = TensorParallel(mesh.tp_group, mesh.tp_rank, mesh.tp_size, sequence, prefetch=True)
        vocabulary = ParallelVocabulary(tp, vocab_size)

        def positions(tensor: Tensor, cut: bool = sequence) -> Tensor:
            return tensor.chunk(4, SEQUENCE)[mesh.tp_rank] if cut else tensor

        own = weight.chunk(4)[mesh.tp_rank].clone().requires_grad_()
        mine = positions(hidden).clone().requires_grad_()
        ours = vocabulary.loss(mine, own, labels)
        torch.testing.assert_close(ours, loss)
        (ours / 7).backward()
        assert own.grad is not None
        torch.testing.assert_close(own.grad, whole_weight.grad.chunk(4)[mesh.tp_rank])
        torch.testing.assert_close(mine.grad, positions(whole_hidden.grad))
        with torch.no_grad():
            logits = vocabulary.logits(positions(hidden), own)
        torch.testing.assert_close(logits, (hidden @ weight.t())[..., :vocab_size])
        own.grad = None
        embedded = vocabulary.embed(tokens, own)
        torch.testing.assert_close(embedded, positions(found))
        embedded.backward(positions(hidden))
        expected = torch.zeros_like(weight).index_add_(0, tokens.flatten(), hidden.flatten(0, 1))
        torch.testing.assert_close(own.grad, expected.chunk(4)[mesh.tp_rank])


def test_a_cut_vocabulary_equals_the_whole_one() -> None:
    run_ranks(_vocabulary, 4, 249, 256)


def test_a_rank_may_hold_nothing_but_padding() -> None:
    run_ranks(_vocabulary, 4, 130, 256)  # rank 2 holds two tokens, rank 3 none
