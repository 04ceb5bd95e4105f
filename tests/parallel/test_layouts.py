"""One curve for every layout: tensor x data parallel, every engine, sequence parallelism on and off, every method.

The suite runs a pairwise cover of the matrix (tests/parallel/layouts.py); all of it is a slow test. The
last tests plant the faults that tensor parallelism is known for and demand that the comparison sees them.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sltrain_dist.model.hf import HFLlama
from sltrain_dist.parallel import linear as parallel_linear
from sltrain_dist.parallel import tensor as parallel_tensor
from sltrain_dist.parallel.mesh import Mesh
from tests.parallel import layouts, tiny
from tests.parallel.layouts import Curve, Layout
from tests.parallel.test_same_curve import assert_same_curve
from tests.ranks import run_ranks

LR = layouts.LR["fan_in"]
FEW = 8  # updates, where a fault would show at once
HYBRID = Layout("fan_in", "fsdp", "1x4", False, hybrid=True)
COVER = [*layouts.cover(layouts.matrix()), HYBRID]


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Cache what a call gives, or raises: a failure must not be run again for every test that needs it."""

    @functools.cache
    def outcome(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except AssertionError as error:
            return error

    def call(*arguments: Any) -> Any:
        found = outcome(*arguments)
        if isinstance(found, AssertionError):
            raise found
        return found

    return call


@once
def references() -> dict[str, tuple[Curve, int]]:
    found = layouts.run([layouts.reference(method) for method in layouts.METHODS])
    return {layout.method: result for layout, result in found.items()}


@once
def results(ranks: int) -> dict[Layout, tuple[Curve, int]]:
    return layouts.run([layout for layout in COVER if layout.ranks == ranks])


@pytest.mark.parametrize("layout", COVER, ids=lambda layout: layout.text)
def test_a_layout_trains_the_curve_of_one_process(layout: Layout) -> None:
    found, support = results(layout.ranks)[layout]
    expected, expected_support = references()[layout.method]
    assert_same_curve(expected, found)
    assert support == expected_support


def test_the_cover_has_every_pair_of_the_matrix() -> None:
    assert len(layouts.matrix()) == 160
    assert len(COVER) < 30
    for layout in layouts.matrix():
        for one, other in (("method", "engine"), ("method", "shape"), ("engine", "shape"), ("shape", "sequence"), ("engine", "sequence"), ("method", "sequence")):  # fmt: skip
            wanted = (getattr(layout, one), getattr(layout, other))
            assert wanted in [(getattr(c, one), getattr(c, other)) for c in COVER]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_whole_matrix() -> None:
    found = layouts.run(layouts.matrix(), timeout=7200)
    for layout, (curve, support) in found.items():
        expected, expected_support = references()[layout.method]
        assert_same_curve(expected, curve)
        assert support == expected_support, layout.text


EVERYTHING: dict[str, Any] = {
    "model": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "method": {"train_scaling": True},
    "options": {"checkpointing": "block", "path": "factorized"},
}
# Variants: what else must not change the curve, each on two tensor-parallel ranks against one process.
VARIANTS: dict[str, dict[str, Any]] = {
    "tied embeddings and biases": {
        "model": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
    },
    "grouped-query heads": {"model": {"num_key_value_heads": 2}},
    "factorized": {"options": {"path": "factorized"}},
    "recomputed blocks": {"options": {"checkpointing": "block"}},
    "trained scale": {"method": {"train_scaling": True}},
    "transformers' decoder": {"options": {"decoder": HFLlama}, "sequence": (False,)},
    "gradients reduced once": {"changes": {"grad_sync": "last"}},
    "compiled blocks": {"compile": True},
    "all of it under ZeRO-1": {"engine": "zero1"} | EVERYTHING,
    "all of it under ZeRO-3": {"engine": "zero3"} | EVERYTHING,
}


def _variant(mesh: Mesh, name: str, sequence: bool) -> Curve:
    import dataclasses

    variant = VARIANTS[name]
    engine = tiny.build(
        mesh,
        variant.get("engine", "fsdp"),
        method=dataclasses.replace(tiny.SHARED_METHODS["fan_in"], **variant.get("method", {})),
        model=dataclasses.replace(tiny.SHARED, **variant.get("model", {})),
        options=variant.get("options"),
        sequence_parallel=sequence,
        **variant.get("changes", {}),
    )
    if variant.get("compile"):
        for block in engine.module.blocks:  # type: ignore[union-attr]
            block.compile(backend="aot_eager")
    return [tiny.update(engine, number, LR) for number in range(FEW)]


def _variants(mesh: Mesh) -> dict[tuple[str, bool], Curve]:
    cut = tiny.arranged(mesh.world_size)
    return {
        (name, sequence): _variant(cut, name, sequence)
        for name, variant in VARIANTS.items()
        for sequence in variant.get("sequence", (False, True))
        if mesh.world_size > 1 or not sequence
    }


@once
def variants(ranks: int) -> dict[tuple[str, bool], Curve]:
    found: dict[tuple[str, bool], Curve] = run_ranks(_variants, ranks, timeout=600)[0]
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_the_curve_of_one_process(name: str) -> None:
    expected = variants(1)[name, False]
    for sequence in VARIANTS[name].get("sequence", (False, True)):
        loss, norm = layouts.difference(expected, variants(2)[name, sequence])
        assert loss <= 1e-4
        assert norm <= 1e-4
    assert expected[-1][0] < expected[0][0] - 0.25


def _no_sum(x: Tensor, group: Any) -> Tensor:
    return x


def _own_part(whole: Tensor, dim: int, group: Any) -> Tensor:
    return whole.chunk(group.size(), dim)[group.rank()].contiguous()


FAULTS: dict[str, tuple[Any, str, Callable[..., Any], bool]] = {
    "partial sums of a region not added": (parallel_tensor, "_summed", _no_sum, False),
    "gradient of the gathered factor not added": (parallel_linear, "scatter_dim", _own_part, False),
    "gradients of norms not added": (
        parallel_tensor.TensorParallel,
        "shared",
        lambda _, p: p,
        True,
    ),
}


def _faulty(_: Mesh) -> dict[str, Curve]:
    mesh = tiny.arranged(2)
    found = {}
    for name, (owner, attribute, fault, sequence) in FAULTS.items():
        right = getattr(owner, attribute)
        setattr(owner, attribute, fault)
        try:
            found[name] = _variant(mesh, "grouped-query heads", sequence)
        finally:
            setattr(owner, attribute, right)
    return found


def test_the_comparison_rejects_planted_faults() -> None:
    for name, curve in run_ranks(_faulty, 2)[0].items():
        loss, norm = layouts.difference(variants(1)["grouped-query heads", False], curve)
        assert max(loss, norm) > 1e-3, name


def _dropout(_: Mesh) -> tuple[list[float], list[float], bool, bool]:
    """Losses of a training with dropout, with recomputed blocks too; whether masks agree and differ where they must."""
    import dataclasses

    mesh = tiny.arranged(2)
    method = dataclasses.replace(tiny.SHARED_METHODS["fan_in"], dropout=0.25)
    curves = []
    for checkpointing in ("block", "none"):
        torch.manual_seed(11)  # as train.build seeds: the same on tensor-parallel ranks
        options = {"checkpointing": checkpointing}
        engine = tiny.build(
            mesh, "fsdp", method=method, model=tiny.SHARED, options=options, sequence_parallel=True
        )
        curves.append([tiny.update(engine, number, LR)[0] for number in range(FEW)])
    masks = {}
    x = torch.ones(2, 8, 16)
    for module in engine.module.modules():
        cut = getattr(module, "parallel", None)
        if isinstance(cut, parallel_linear.ParallelLinear):
            masks[cut.row] = cut._dropped(x, 0.25)
    agree, differ = (
        parallel_tensor.all_gather(masks[row].contiguous(), mesh.tp_group).wait()
        for row in (False, True)
    )
    assert 0.15 < float((masks[True] == 0).float().mean()) < 0.35
    recomputed, kept = curves
    return recomputed, kept, torch.equal(agree[0], agree[1]), torch.equal(differ[0], differ[1])


def test_dropout_agrees_on_common_inputs_and_differs_on_cut_ones() -> None:
    (recomputed, losses, agree, differ), (_, other_losses, *_) = run_ranks(_dropout, 2)
    assert losses == other_losses
    assert losses == recomputed
    assert losses[-1] < losses[0] - 0.3
    assert agree
    assert not differ
