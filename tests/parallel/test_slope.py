"""Method slope across engines: the second mask is chosen by the rule wherever its rows lie, moves, and padding stays zero."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from sltrain_dist.config import OptimizerConfig
from sltrain_dist.model.hf import HFLlama
from sltrain_dist.ops.pattern import Pattern, are_largest, unpack
from sltrain_dist.ops.pruned import compose
from sltrain_dist.parallel.engine import MODEL, Engine
from sltrain_dist.parallel.mesh import Mesh
from sltrain_dist.params.slope import layer_pattern
from tests.parallel import tiny
from tests.parallel.layouts import difference
from tests.ranks import run_ranks

METHOD = dataclasses.replace(tiny.SHARED_METHODS["slope"], pattern="2:4,1=1:4")
# An MLP that is padded in the middle of a group, 173 to 192, and keys too thin to be pruned: 8 x 64.
NARROW = dataclasses.replace(tiny.SHARED, intermediate_size=173)
THIN = dataclasses.replace(NARROW, head_dim=8, num_attention_heads=4, num_key_value_heads=1)
UPDATES = 7  # masks are chosen at the start, after 3 and after 6
HALF = {"dtype": "bfloat16"}
PURE = {"dtype": "bfloat16", "master_weights": False}
Layout = tuple[str, int, dict[str, Any]]  # engine, tensor parallel, changes
TWO: dict[str, Layout] = {
    "fsdp": ("fsdp", 1, {}),
    "hsdp": ("fsdp", 1, {"replicate": 2}),
    "fsdp, tensor parallel": ("fsdp", 2, {}),
    "zero0": ("zero0", 1, {}),
    "zero1": ("zero1", 1, {}),
    "zero2, tensor parallel": ("zero2", 2, {"sequence_parallel": True}),
    "zero3": ("zero3", 1, {}),
}
HALVES: dict[str, Layout] = {
    "fsdp": ("fsdp", 1, HALF),
    "fsdp pure": ("fsdp", 1, PURE),
    "zero1": ("zero1", 1, HALF),
    "zero2 pure": ("zero2", 1, PURE),
    "zero3": ("zero3", 1, HALF),
}


def build(layout: Layout, model: Any = NARROW, **options: Any) -> Engine:
    kind, tensor, changes = layout
    mesh = tiny.arranged(tensor, changes.get("replicate", 1))
    return tiny.build(mesh, kind, method=METHOD, model=model, **(changes | options))


def layers(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """Whole values, mask and (from the whole of all ranks) offsets of every pruned linear, by name."""
    state = {name: t.full_tensor().clone() for name, t in engine.state().items()}
    found = {}
    for name, spec in engine.specs.items():
        if spec.kind == "mask":
            layer = name.removesuffix(".backward")
            offsets = engine.specs[f"{layer}.offsets"]
            count = torch.Size(offsets.shape).numel()
            made = offsets.initial.flat(METHOD.seed, f"{layer}.offsets", 0, count)
            found[layer] = {
                "values": state[f"{MODEL}{layer}.values"],
                "backward": state[f"{MODEL}{name}"],
                "offsets": made.view(offsets.shape),
            }
    return found


def pattern_of(layer: str) -> Pattern:
    return layer_pattern(METHOD.pattern, int(layer.split(".")[2]))


def expected_mask(layer: str, parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Of dense matrices: which kept weights are among the N largest of their M rows."""
    pattern = pattern_of(layer)
    values = parts["values"].to(dtype)
    w = compose(values, parts["offsets"], pattern)
    there = compose(torch.ones_like(values), parts["offsets"], pattern) == 1
    magnitudes = w.abs().masked_fill(~there, -1.0)
    return there & are_largest(magnitudes.t(), pattern).t()


def held_mask(layer: str, parts: dict[str, Tensor]) -> Tensor:
    bits = unpack(parts["backward"], 1, parts["values"].shape[1]).float()
    return compose(bits, parts["offsets"], pattern_of(layer)) == 1


def run(layout: Layout, updates: int) -> tuple[Engine, list[tuple[float, float]], list[Any]]:
    """An engine after some updates, its curve, and what it held at the start, and after each third."""
    engine = build(layout)
    held, curve = [layers(engine)], []
    for number in range(updates):
        curve.append(tiny.update(engine, number, 1e-2))
        if (number + 1) % METHOD.mask_change_freq == 0:
            held.append(layers(engine))
    return engine, curve, held


def check_rule(held: list[Any], dtype: torch.dtype, name: str) -> None:
    for layer in held[0]:
        for at in held:
            expected = expected_mask(layer, at[layer], dtype)
            assert torch.equal(held_mask(layer, at[layer]), expected), (name, layer)
    moved = [layer for layer in held[0] if not torch.equal(held[0][layer]["backward"], held[-1][layer]["backward"])]  # fmt: skip
    assert len(moved) == len(held[0]), name


def check_padding(engine: Engine, name: str) -> None:
    for layer, parts in layers(engine).items():
        w = compose(parts["values"], parts["offsets"], pattern_of(layer))
        groups = (w != 0).unflatten(1, (-1, pattern_of(layer).group)).sum(-1)
        assert int(groups.max()) <= pattern_of(layer).kept, (name, layer)
        if ".down_proj" in layer:
            assert not w[:, 173:].any(), name
            assert w[:, :173].any()
        elif ".mlp." in layer:
            assert not w[173:].any(), name


def _rules(mesh: Mesh, layouts: dict[str, Layout], dtype: torch.dtype) -> dict[str, Any]:
    curves = {}
    for name, layout in layouts.items():
        engine, curves[name], held = run(layout, UPDATES)
        if layout[2] == HALF:
            # Masters are what a state has; what was chosen from is their rounding.
            check_rule(held, torch.bfloat16, name)
        else:
            check_rule(held, dtype, name)
        check_padding(engine, name)
        before = layers(engine)
        engine.choose_masks()
        engine.choose_masks()  # the same again: nothing is drawn
        again = layers(engine)
        engine.load_state(engine.state(), engine.scalars())
        for layer, parts in layers(engine).items():
            assert torch.equal(parts["backward"], again[layer]["backward"]), name
            assert torch.equal(parts["values"], before[layer]["values"]), name
    return curves


def test_masks_follow_the_rule_on_two_ranks_of_every_engine() -> None:
    alone = run_ranks(_rules, 1, {"one": ("fsdp", 1, {})}, torch.float32)[0]["one"]
    assert alone[-1][0] < alone[0][0] - 0.3
    for found in run_ranks(_rules, 2, TWO, torch.float32, timeout=500):
        for name, curve in found.items():
            loss, norm = difference(alone, curve)
            assert max(loss, norm) < 1e-4, name


def test_masks_follow_the_models_own_bfloat16_weights() -> None:
    for found in run_ranks(_rules, 2, HALVES, torch.bfloat16, timeout=500):
        assert all(curve[-1][0] < curve[0][0] - 0.2 for curve in found.values())


def _without_masks(mesh: Mesh) -> tuple[Any, Any, Any]:
    """Curves with masks chosen anew, never, and of other things that must change nothing."""
    never = dataclasses.replace(METHOD, mask_change_freq=0)
    kept = tiny.train(tiny.build(mesh, "fsdp", method=never, model=NARROW), 0, UPDATES)
    plain = tiny.train(build(("fsdp", 1, {})), 0, UPDATES)
    others = {
        "recomputed": {"options": {"checkpointing": "block"}},
        "selective": {"options": {"checkpointing": "selective"}},
        "transformers": {"options": {"decoder": HFLlama}},
    }
    found = {name: tiny.train(build(("fsdp", 1, {}), **more), 0, UPDATES) for name, more in others.items()}  # fmt: skip
    return plain, kept, found


def test_masks_matter_and_how_blocks_run_does_not() -> None:
    plain, kept, others = run_ranks(_without_masks, 1)[0]
    assert (
        difference(plain[:4], kept[:4])[0] < 1e-6
    )  # the first gradient with the new mask is that of update 4
    assert difference(plain, kept)[0] > 1e-4
    for name, curve in others.items():
        assert max(difference(plain, curve)) < 1e-5, name


def _per_layer(mesh: Mesh) -> None:
    optimizer = OptimizerConfig(name="adamw8bit", lr=1e-2)
    curves = [
        tiny.train(tiny.build(mesh, "fsdp", optimizer, METHOD, NARROW, per_layer=per_layer), 0, UPDATES)
        for per_layer in (False, True)
    ]  # fmt: skip
    assert [loss for loss, _ in curves[0]] == pytest.approx([loss for loss, _ in curves[1]], abs=1e-5)  # fmt: skip
    assert curves[0][-1][0] < curves[0][0][0] - 0.3


def test_8_bit_moments_per_layer() -> None:
    run_ranks(_per_layer, 2)


def _thin(mesh: Mesh) -> list[str]:
    engine = build(("zero3", 1, {}), THIN)
    tiny.train(engine, 0, 4)
    return [name for name in engine.specs if "_proj" in name]


def test_thin_matrices_are_trained_dense() -> None:
    names = run_ranks(_thin, 1)[0]
    assert "model.layers.0.self_attn.k_proj.weight" in names
    assert "model.layers.0.self_attn.q_proj.backward" in names
