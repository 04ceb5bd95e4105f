"""The three kinds of activation checkpointing train the same curve, to the bit, under every engine and layout.

And "selective" sends nothing that "none" does not: no collective runs a second time.
"""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sltrain_dist.parallel import tensor as parallel_tensor
from sltrain_dist.parallel.mesh import Mesh
from tests.parallel import tiny
from tests.ranks import run_ranks

KINDS = ("none", "block", "selective")
UPDATES = 4
ZERO3: dict[str, Any] = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
Curve = list[tuple[float, float]]


def _curve(mesh: Mesh, engine: str, checkpointing: str, path: str, **changes: Any) -> Curve:
    if engine == "zero3":
        changes["ds_config"] = ZERO3
    options = {"checkpointing": checkpointing, "path": path}
    built = tiny.build(
        mesh,
        engine,
        method=tiny.SHARED_METHODS["fan_in"],
        model=tiny.SHARED,
        options=options,
        **changes,
    )
    return tiny.train(built, 0, UPDATES)


CASES: dict[str, tuple[int, str, str, dict[str, Any]]] = {  # tensor parallel, engine, path, changes
    "fsdp": (1, "fsdp", "composed", {}),
    "fsdp bfloat16": (1, "fsdp", "factorized", {"dtype": "bfloat16", "master_weights": False}),
    "zero0": (1, "zero0", "factorized", {}),
    "zero2": (1, "zero2", "composed", {}),
    "tp": (2, "fsdp", "composed", {}),
    "tp sequence": (2, "fsdp", "factorized", {"sequence_parallel": True}),
    "tp zero1": (2, "zero1", "factorized", {"sequence_parallel": True}),
    "zero3": (1, "zero3", "factorized", {}),
    "tp zero3": (2, "zero3", "composed", {"sequence_parallel": True}),
}


def _curves(_: Mesh) -> dict[tuple[str, str], Curve]:
    found = {}
    for (name, (tp, engine, path, changes)), kind in itertools.product(CASES.items(), KINDS):
        found[name, kind] = _curve(tiny.arranged(tp), engine, kind, path, **changes)
    return found


@pytest.fixture(scope="module")
def curves() -> dict[tuple[str, str], Curve]:
    result: dict[tuple[str, str], Curve] = run_ranks(_curves, 2, timeout=600)[0]
    return result


@pytest.mark.parametrize("name", CASES)
def test_one_curve_to_the_bit(name: str, curves: dict[tuple[str, str], Curve]) -> None:
    assert curves[name, "none"][-1][0] < curves[name, "none"][0][0]
    for kind in ("block", "selective"):
        assert curves[name, kind] == curves[name, "none"], kind


def _collectives(_: Mesh) -> dict[tuple[str, bool], int]:
    """Calls of a tensor-parallel rank in one update, by kind and sequence parallelism."""
    mesh, counted = tiny.arranged(2), {}
    names = ((parallel_tensor, "_all_gather"), (parallel_tensor, "_reduce_scatter"), (dist, "all_reduce"))  # fmt: skip
    for kind, sequence in itertools.product(KINDS, (False, True)):
        options = {"checkpointing": kind}
        engine = tiny.build(mesh, "fsdp", options=options, sequence_parallel=sequence)
        calls = 0

        def counting(real: Any) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                nonlocal calls
                calls += 1
                return real(*arguments, **named)

            return call

        with pytest.MonkeyPatch.context() as patch:
            for owner, name in names:
                patch.setattr(owner, name, counting(getattr(owner, name)))
            for tokens, labels in tiny.micro_batches(mesh, 0):
                loss = engine.module(tokens, labels)
                torch.autograd.backward(loss)
        counted[kind, sequence] = calls
    return counted


def test_selective_sends_what_none_does() -> None:
    found = run_ranks(_collectives, 2)[0]
    for sequence in (False, True):
        assert found["selective", sequence] == found["none", sequence] > 0
        assert found["block", sequence] > found["none", sequence]
