"""THE central test: every engine on every number of ranks trains the same fp32 curve.

"Same" is 1e-4 absolute in the loss (and relative in the gradient norm, because Adam alone forgives a
wrong scale) over 20 updates in which the loss falls by at least 1 nat. The last tests plant faults
that engines are known to have and demand that the very same comparison rejects them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sltrain_dist.optim import OptimizerFactory
from sltrain_dist.parallel.engine import build_engine
from sltrain_dist.parallel.mesh import Mesh
from tests.parallel import tiny
from tests.ranks import run_ranks

Curve = list[tuple[float, float]]
UPDATES = 20
FAULTY_UPDATES = 8  # a fault shows at once
# zero3 last: DeepSpeed replaces torch.nn.functional.linear in its process.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp": ("fsdp", {}),
    "fsdp, grad_sync last": ("fsdp", {"grad_sync": "last"}),
    "zero0": ("zero0", {}),
    "zero1": ("zero1", {}),
    "zero2": ("zero2", {}),
    "zero3": ("zero3", {}),
}


def assert_same_curve(one: Curve, other: Curve) -> None:
    assert one[0][0] - one[-1][0] >= 1.0, f"loss fell only from {one[0][0]} to {one[-1][0]}"
    for number, ((loss, norm), (other_loss, other_norm)) in enumerate(
        zip(one, other, strict=False)
    ):
        assert abs(loss - other_loss) <= 1e-4, f"update {number}: loss {loss} and {other_loss}"
        assert abs(norm - other_norm) <= 1e-4 * norm, f"update {number}: norm {norm}, {other_norm}"
    assert len(one) == len(other) == UPDATES


def _curve(
    mesh: Mesh,
    kind: str,
    updates: int,
    hook: Callable[[Tensor], Tensor] | None = None,
    **changes: Any,
) -> Curve:
    engine = tiny.build(mesh, kind, model=tiny.MODEL, **changes)
    return [tiny.update(engine, number, 1e-2, hook) for number in range(updates)]


def _not_averaged(mesh: Mesh) -> Curve:
    """DeepSpeed's all-reduce left out: every rank follows its own data."""
    engine = tiny.build(mesh, "zero0", model=tiny.MODEL)
    engine.module.enable_backward_allreduce = False  # type: ignore[assignment]
    return tiny.train(engine, 0, FAULTY_UPDATES)


def _averaged_over_ranks(mesh: Mesh) -> Curve:
    """The engine's own division by the number of ranks left in: gradients half as large."""
    return _curve(mesh, "fsdp", FAULTY_UPDATES, lambda loss: loss / mesh.dp_size)


def _skipped_rank(mesh: Mesh) -> Curve:
    """The last rank's data contributes no gradient."""
    weight = 0.0 if mesh.dp_rank == mesh.dp_size - 1 else 1.0
    return _curve(mesh, "zero2", FAULTY_UPDATES, lambda loss: loss * weight)


def _detached_factor(mesh: Mesh) -> Curve:
    """No gradient reaches A."""

    def make(*, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        model = tiny.tiny_factory(model=tiny.MODEL)(device=device, dtype=dtype)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and not name.endswith(".a"))
        return model

    optimizer = OptimizerFactory(tiny.OPTIMIZER)
    engine = build_engine(
        make, mesh, tiny.config("fsdp", mesh.dp_size), optimizer, tiny.METHOD.seed
    )
    return tiny.train(engine, 0, FAULTY_UPDATES)


FAULTS = {
    "no averaging over ranks": _not_averaged,
    "divided by the number of ranks": _averaged_over_ranks,
    "one rank's data skipped": _skipped_rank,
    "a detached factor": _detached_factor,
}


def _all(mesh: Mesh) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Every fault (on two ranks) and every engine, in one process group: start-up is what costs."""
    torch.manual_seed(0)
    faulty = {name: fault(mesh) for name, fault in FAULTS.items()} if mesh.dp_size > 1 else {}
    return {
        name: _curve(mesh, kind, UPDATES, **extra) for name, (kind, extra) in KINDS.items()
    }, faulty


_RESULTS: dict[int, Any] = {}


def _results(world_size: int) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """What `_all` found on so many ranks; run once, also where it fails."""
    if world_size not in _RESULTS:
        try:
            _RESULTS[world_size] = run_ranks(_all, world_size, timeout=400)
        except AssertionError as error:
            _RESULTS[world_size] = error
    per_rank = _RESULTS[world_size]
    if isinstance(per_rank, AssertionError):
        raise per_rank
    assert all(curves == per_rank[0][0] for curves, _ in per_rank), "ranks disagree"
    result: tuple[dict[str, Curve], dict[str, Curve]] = per_rank[0]
    return result


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_and_number_of_ranks_gives_the_same_curve(kind: str, world_size: int) -> None:
    assert_same_curve(_results(1)[0]["fsdp"], _results(world_size)[0][kind])


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_rejects_a_planted_fault(fault: str) -> None:
    with pytest.raises(AssertionError, match=r"update \d+: (loss|norm)"):
        assert_same_curve(_results(1)[0]["fsdp"], _results(2)[1][fault])
