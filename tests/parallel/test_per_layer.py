"""Updates inside backward give the curve of updates after it, on any ranks; faults leave what they must alone."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sltrain_dist.parallel.fsdp import FsdpEngine
from sltrain_dist.parallel.mesh import Mesh, close, initialise
from tests.parallel import tiny
from tests.ranks import run_ranks

METHOD = dataclasses.replace(tiny.METHOD, rank=64, density=0.125)
PLAIN = dataclasses.replace(tiny.OPTIMIZER, grad_clipping=0.0)
UPDATES = 8
PURE = {"dtype": "bfloat16", "master_weights": False}
CASES: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (  # optimizer, formats
    ({"name": "adamw"}, {}),
    ({"name": "sgd", "momentum": 0.9}, {"dtype": "bfloat16"}),
    ({"name": "adamw8bit"}, {}),
    ({"name": "adamw8bit", "embedding_state_bits": 8, "rounding": "stochastic"}, PURE),
)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield initialise(device="cpu")
    close()


def engine(mesh: Mesh, optimizer: Any, per_layer: bool, **changes: Any) -> FsdpEngine:
    made = tiny.build(mesh, "fsdp", optimizer, METHOD, tiny.SHARED, per_layer=per_layer, **changes)
    assert isinstance(made, FsdpEngine)
    return made


def pairs(mesh: Mesh, tp: int) -> dict[str, tuple[list[Any], list[Any]]]:
    """{optimizer and format: (curve after backward, curve inside)}."""
    arranged = tiny.arranged(tp) if mesh.world_size > 1 else mesh
    found = {}
    for values, formats in CASES:
        optimizer = dataclasses.replace(PLAIN, **values)
        curves = [
            tiny.train(engine(arranged, optimizer, per_layer, **formats), 0, UPDATES)
            for per_layer in (False, True)
        ]
        found[f"{values['name']} {formats}"] = (curves[0], curves[1])
    return found


@pytest.mark.parametrize("name", ["muon", "galore_adamw"])
def test_optimizers_of_whole_matrices(mesh: Mesh, name: str) -> None:
    """On one rank they too can update inside backward."""
    if name == "galore_adamw":
        pytest.importorskip("galore_torch")
    optimizer = dataclasses.replace(PLAIN, name=name, proj_rank=8, update_proj_gap=3)
    after, inside = (
        tiny.train(engine(mesh, optimizer, per_layer), 0, UPDATES) for per_layer in (False, True)
    )
    check({name: (after, inside)})


def check(found: dict[str, tuple[list[Any], list[Any]]]) -> None:
    for name, (after, inside) in found.items():
        for one, other in zip(after, inside, strict=True):
            assert other == pytest.approx(one, rel=1e-6), name
        assert after[0][0] - after[-1][0] > (0.02 if "sgd" in name else 0.3), name


def test_one_rank(mesh: Mesh) -> None:
    check(pairs(mesh, 1))


@pytest.mark.parametrize(("ranks", "tp"), [(2, 1), (2, 2), (4, 2)])
def test_ranks(ranks: int, tp: int) -> None:
    check(run_ranks(pairs, ranks, tp)[0])


def test_accumulation_steps_once(mesh: Mesh) -> None:
    """One batch in 1 and 4 micro-batches: one curve, and as many optimizer steps (GaLore took four)."""
    curves = []
    for count in (1, 4):
        made = engine(mesh, PLAIN, True, gradient_accumulation=count)
        curve = []
        for number in range(UPDATES):
            tokens, labels = tiny.batch(number)
            made.begin_update(0.01)
            total = 0.0
            for part, (x, y) in enumerate(
                zip(tokens.chunk(count), labels.chunk(count), strict=True)
            ):
                loss = made.module(x, y) / (labels >= 0).sum()
                made.accumulate(loss, last=part == count - 1)
                total += loss.item()
            curve.append((total, made.step(0.01)))
        steps = {int(state["step"]) for state in made.optimizer.state.values()}
        assert steps == {UPDATES}
        curves.append(curve)
    for one, other in zip(*curves, strict=True):
        assert other == pytest.approx(one, rel=1e-5)


def test_gradients_of_one_block_at_a_time(mesh: Mesh) -> None:
    """Whenever a block is updated, no other block's gradient exists."""
    made = engine(mesh, PLAIN, True, gradient_accumulation=1)
    seen: list[set[str]] = []
    inner = made._update

    def watched(names: Any, before: float | None = None) -> float:
        alive = {name for name, tensor in made.sharded.items() if tensor.grad is not None}
        seen.append({name.rpartition(".")[0] for name in alive - set(names)})
        return inner(names, before)

    assert made._layers is not None
    made._layers._update = watched
    tokens, labels = tiny.batch(0)
    made.begin_update(0.01)
    made.accumulate(made.module(tokens, labels) / 100, last=True)
    made.step(0.01)
    assert len(seen) == tiny.SHARED.num_hidden_layers + 3  # embedding, head, last norm
    assert seen == [set()] * len(seen)


def test_a_projection_that_was_left_out_is_made_at_the_next_update(mesh: Mesh) -> None:
    pytest.importorskip("galore_torch")
    optimizer = dataclasses.replace(PLAIN, name="galore_adamw", proj_rank=8, update_proj_gap=100)
    made = engine(mesh, optimizer, True)
    name = "model.layers.1.mlp.up_proj.b"
    with poisoned(layer(made, "layers.1.mlp.up_proj")):
        tiny.update(made, 0, 0.01)
    before = weights(made)[name]
    assert made.skipped_blocks
    tiny.update(made, 1, 0.01)
    assert not torch.equal(before, weights(made)[name])


def layer(made: FsdpEngine, end: str) -> nn.Module:
    return next(module for name, module in made.module.named_modules() if name.endswith(end))


@contextlib.contextmanager
def poisoned(module: nn.Module, really: bool = True) -> Iterator[None]:
    """The gradient of what ``module`` gives is not finite."""

    def poison(module: Any, inputs: Any, output: Tensor) -> None:
        if really and output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)

    handle = module.register_forward_hook(poison)
    yield
    handle.remove()


def weights(made: FsdpEngine) -> dict[str, Tensor]:
    return {name: local.detach().clone() for name, local in made.local.items()}


@pytest.mark.parametrize("bad", [0, 1])
def test_a_loss_that_is_not_finite_changes_nothing(mesh: Mesh, bad: int) -> None:
    made = engine(mesh, PLAIN, True)
    tiny.train(made, 0, 1)
    before = weights(made)
    made.begin_update(0.01)
    for number, (tokens, labels) in enumerate(tiny.micro_batches(mesh, 1)):
        loss = made.module(tokens, labels)
        made.accumulate(loss * (math.nan if number == bad else 1.0), last=number == 1)
    assert math.isnan(made.step(0.01))
    after = weights(made)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert made.updates == 1
    twin = engine(mesh, PLAIN, True)
    tiny.train(twin, 0, 1)
    assert tiny.train(made, 2, 2) == tiny.train(twin, 2, 2)  # nothing of the broken update is left


def broken_block(mesh: Mesh) -> tuple[list[str], int, float, float]:
    """Rank 0 alone has a gradient that is not finite, of one factor: who changed, what was counted."""
    made = engine(mesh, PLAIN, True)
    tiny.train(made, 0, 1)
    before = weights(made)
    # the loss is finite, and so is everything above the poisoned layer
    with poisoned(layer(made, "layers.1.mlp.up_proj"), mesh.rank == 0):
        norm = tiny.update(made, 1, 0.01)[1]
    after = weights(made)
    same = [name for name in before if torch.equal(before[name], after[name])]
    loss = tiny.update(made, 2, 0.01)[0]
    return same, made.skipped_blocks, norm, loss


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_blocks_gradient_that_is_not_finite(ranks: int, mesh: Mesh) -> None:
    results = [broken_block(mesh)] if ranks == 1 else run_ranks(broken_block, ranks)
    for same, skipped, norm, loss in results:
        left = {name.split(".")[2] for name in same if ".layers." in name}
        assert "1" in left  # the poisoned block, and what its infinite gradient flowed into
        assert "lm_head.weight" not in same
        assert skipped >= 1
        assert math.isfinite(norm)
        assert math.isfinite(loss)
    assert len({skipped for _, skipped, _, _ in results}) == 1


def test_lagged_clipping_after_blocks_were_left_alone(mesh: Mesh) -> None:
    """The norm of a part, or of nothing, is no norm to clip the next update by; nothing updated is no update."""
    optimizer = dataclasses.replace(PLAIN, grad_clipping=0.05, per_layer_clip="lagged")
    made = engine(mesh, optimizer, True)
    before = tiny.train(made, 0, 1)[0][1]
    assert made._layers is not None
    for number, module in enumerate((layer(made, "layers.1.mlp.up_proj"), made.module)):
        with poisoned(module):
            norm = tiny.update(made, 1 + number, 0.01)[1]
        assert made._layers.last_norm == before
        assert math.isfinite(norm) is (number == 0)
    assert made.updates == 2
    steps = {int(state["step"]) for state in made.optimizer.state.values()}
    assert steps == {2}


@pytest.mark.parametrize("clip", ["block", "lagged"])
def test_clipping(mesh: Mesh, clip: str) -> None:
    """Against the same done by hand on whole gradients, with SGD, whose update is the clipped gradient."""
    limit = 0.05
    optimizer = dataclasses.replace(
        PLAIN, name="sgd", weight_decay=0.0, grad_clipping=limit, per_layer_clip=clip
    )
    clipped = engine(mesh, optimizer, True)
    free = engine(mesh, dataclasses.replace(optimizer, grad_clipping=0.0), False)
    last_norm = None
    for number in range(3):
        old = weights(clipped)
        for name, local in free.local.items():
            local.data.copy_(old[name])
        for fsdp_module in (free.module,):
            fsdp_module.reshard()  # type: ignore[operator]
        norm = tiny.update(clipped, number, 1.0)[1]
        tiny.update(free, number, 1.0)
        gradients = {name: old[name] - local.detach() for name, local in free.local.items()}
        assert clipped._layers is not None
        for unit in clipped._layers._units:
            own = math.sqrt(sum(float(gradients[name].square().sum()) for name in unit))
            by = own if clip == "block" or last_norm is None else last_norm
            factor = min(1.0, limit / (by + 1e-6))
            for name in unit:
                moved = old[name] - clipped.local[name].detach()
                torch.testing.assert_close(moved, gradients[name] * factor, rtol=1e-3, atol=1e-6)
        total = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        assert norm == pytest.approx(total, rel=1e-4)
        last_norm = norm


def test_the_norm_before_survives_a_checkpoint(mesh: Mesh) -> None:
    optimizer = dataclasses.replace(PLAIN, grad_clipping=0.05, per_layer_clip="lagged")
    first = engine(mesh, optimizer, True)
    tiny.train(first, 0, 2)
    second = engine(mesh, optimizer, True)
    saved = {name: tensor.to_local().clone() for name, tensor in first.state().items()}
    state = second.state()
    for name, tensor in state.items():
        tensor.to_local().copy_(saved[name])
    second.load_state(state, first.scalars())
    assert tiny.train(first, 2, 2) == tiny.train(second, 2, 2)
