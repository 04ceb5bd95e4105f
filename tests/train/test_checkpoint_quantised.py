"""8-bit moments in checkpoints: the same layout reads bytes, every other one decodes and encodes them anew."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from sltrain_dist.config import DataConfig, OptimizerConfig, TrainConfig
from sltrain_dist.optim import describe
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.parallel.mesh import Mesh, close, initialise
from sltrain_dist.tools.checkpoint_report import faults
from sltrain_dist.tools.convert import convert
from sltrain_dist.train.checkpoint import Progress, load, save
from sltrain_dist.train.checkpoint_quantised import SavedMoments
from tests.parallel import tiny
from tests.ranks import run_ranks

BEFORE, AFTER = 3, 6
METHOD = dataclasses.replace(
    tiny.METHOD, rank=64, density=0.125
)  # factors of 4096 elements and more
OPTIMIZER = dataclasses.replace(tiny.OPTIMIZER, name="adamw8bit", embedding_state_bits=8)
MODEL = dataclasses.replace(tiny.SHARED, num_hidden_layers=1, vocab_size=250)


class Layout(NamedTuple):
    kind: str
    tp: int = 1
    replicate: int = 1

    def mesh(self, mesh: Mesh) -> Mesh:
        return mesh if mesh.world_size == 1 else tiny.arranged(self.tp, self.replicate)

    def engine(self, mesh: Mesh) -> Engine:
        return tiny.build(mesh, self.kind, OPTIMIZER, method=METHOD, model=MODEL)

    def config(
        self, mesh: Mesh, folder: str, optimizer: OptimizerConfig = OPTIMIZER
    ) -> TrainConfig:
        engine = tiny.config(self.kind, mesh.dp_size, tensor_parallel=self.tp)
        return TrainConfig(MODEL, METHOD, DataConfig(), optimizer, engine, save_dir=folder)


LAYOUTS = {
    "fsdp-2x2": Layout("fsdp", tp=2),
    "fsdp-4": Layout("fsdp"),
    "hsdp-2x2": Layout("fsdp", replicate=2),
    "zero0-2x2": Layout("zero0", tp=2),
    "zero1-4": Layout("zero1"),
    "zero2-2x2": Layout("zero2", tp=2),
    "zero3-2x2": Layout("zero3", tp=2),
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield initialise(device="cpu")
    close()


def losses(engine: Engine) -> list[float]:
    return [loss for loss, _ in tiny.train(engine, BEFORE, AFTER)]


def save_and_resume(mesh: Mesh, folder: str) -> dict[str, Any]:
    """Every layout: train, save, go on; a fresh engine of the same, and one of the next layout, resume."""
    found: dict[str, Any] = {}
    names = list(LAYOUTS)
    for number, (name, layout) in enumerate(LAYOUTS.items()):
        arranged = layout.mesh(mesh)
        engine = layout.engine(arranged)
        tiny.train(engine, 0, BEFORE)
        config = layout.config(arranged, f"{folder}/{name}")
        checkpoint = save(engine, Progress(BEFORE, 0), config).folder
        assert checkpoint is not None
        straight = losses(engine)
        twin = layout.engine(arranged)
        resumed = load(checkpoint, twin, config)
        again = losses(
            twin
        )  # now: DeepSpeed keeps the ranks' arrangement of the newest engine for all
        other_name = names[(number + 1) % len(names)]
        other = LAYOUTS[other_name]
        arranged = other.mesh(mesh)
        engine = other.engine(arranged)
        config = other.config(arranged, f"{folder}/{name} to {other_name}")
        messages = load(checkpoint, engine, config).messages
        save(engine, Progress(BEFORE, 0), config)
        found[name] = (straight, again, resumed.exact, losses(engine), messages)
    return found


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("eight_bits")
    return folder, run_ranks(save_and_resume, 4, str(folder))[0]


def test_the_same_layout_goes_on_bit_by_bit(four: Any) -> None:
    for name, (straight, again, exact, _, _) in four[1].items():
        assert exact, name
        assert again == straight, name


def test_another_layout_goes_on_and_says_what_it_did(four: Any) -> None:
    for name, (straight, _, _, other, messages) in four[1].items():
        assert other == pytest.approx(straight, rel=1e-2), name
        assert any("8-bit moments were decoded" in message for message in messages), name


def test_all_layouts_train_alike(four: Any) -> None:
    first = four[1]["fsdp-4"][0]
    assert first[0] - first[-1] > 0.2
    for name, (straight, *_) in four[1].items():
        assert straight == pytest.approx(first, rel=1e-2), name


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    document = json.loads((folder / "state.json").read_text())
    return {
        name.removeprefix("model."): tuple(entry["shape"])
        for name, entry in document["tensors"].items()
        if name.startswith("model.")
    }


@pytest.mark.parametrize("pair", range(len(LAYOUTS)))
def test_moments_survive_the_change_of_layout(four: Any, pair: int) -> None:
    """Element by element, within a step of the code: 1/32 of the element, or of nothing in a block of large ones."""
    names = list(LAYOUTS)
    name, other = names[pair], names[(pair + 1) % len(names)]
    before = four[0] / name / f"step_{BEFORE}"
    after = four[0] / f"{name} to {other}" / f"step_{BEFORE}"
    assert faults(before) == []
    assert faults(after) == []
    one, two = SavedMoments(before), SavedMoments(after)
    assert set(one.names) == set(two.names)
    assert len(one.names) > 10
    for parameter in one.names:
        shape = shapes(before)[parameter]
        for moment in ("exp_avg", "exp_avg_sq"):
            old, new = one.read(parameter, moment, shape), two.read(parameter, moment, shape)
            assert old.abs().max() > 0
            slack = 0.05 * old.abs() + 1e-2 * old.abs().max()
            assert bool(((old - new).abs() <= slack).all()), (parameter, moment)


def test_what_is_decoded_is_what_a_float_run_has(mesh: Mesh, tmp_path: Path) -> None:
    """After one update both kinds of moments are the same but for the code."""
    layout = Layout("fsdp")
    eight = layout.engine(mesh)
    plain = tiny.build(mesh, "fsdp", tiny.OPTIMIZER, method=METHOD, model=MODEL)
    for engine in (eight, plain):
        tiny.train(engine, 0, 1)
    folder = save(eight, Progress(1, 0), layout.config(mesh, str(tmp_path))).folder
    assert folder is not None
    saved, state = SavedMoments(folder), plain.state()
    for name in saved.names:
        for moment in ("exp_avg", "exp_avg_sq"):
            exact = state[f"optimizer.{moment}.{name}"].full_tensor()
            error = (saved.read(name, moment, tuple(exact.shape)) - exact).abs().max()
            assert error <= 0.02 * exact.abs().max(), (name, moment)


def test_a_lost_piece_is_named(mesh: Mesh, tmp_path: Path) -> None:
    layout = Layout("fsdp")
    engine = layout.engine(mesh)
    folder = save(engine, Progress(1, 0), layout.config(mesh, str(tmp_path))).folder
    assert folder is not None
    path = folder / "pieces-00000.json"
    name = SavedMoments(folder).names[0]
    path.write_text(path.read_text().replace(f'["{name}"', '["elsewhere"'))
    with pytest.raises(RuntimeError, match=f"8-bit exp_avg of {name} are missing"):
        load(folder, engine, layout.config(mesh, str(tmp_path)))


def test_other_bits_for_the_embedding_are_refused(mesh: Mesh, tmp_path: Path) -> None:
    layout = Layout("fsdp")
    engine = layout.engine(mesh)
    folder = save(engine, Progress(1, 0), layout.config(mesh, str(tmp_path))).folder
    assert folder is not None
    other = dataclasses.replace(OPTIMIZER, embedding_state_bits=32)
    with pytest.raises(Exception, match="trained with --embedding_state_bits 8"):
        load(folder, engine, layout.config(mesh, str(tmp_path), other))


@pytest.mark.parametrize("kind", ["zero0", "zero1", "zero2", "zero3"])
def test_a_copied_state_is_of_its_moment(mesh: Mesh, kind: str) -> None:
    """What a save that goes on beside training writes must not change with the next update."""
    engine = Layout(kind).engine(mesh)
    tiny.train(engine, 0, 1)
    assert engine.copies_state
    state = engine.state()
    before = {name: tensor.to_local().clone() for name, tensor in state.items()}
    assert any(name.startswith("quantised.") for name in state)
    tiny.train(engine, 1, 1)
    assert all(torch.equal(before[name], tensor.to_local()) for name, tensor in state.items())


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_the_summary_counts_each_element_once(mesh: Mesh, kind: str) -> None:
    engine = Layout(kind).engine(mesh)
    groups = {group["bits"]: group["elements"] for group in describe(engine.optimizer)["groups"]}
    twin = Layout("fsdp").engine(mesh)
    expected = {group["bits"]: group["elements"] for group in describe(twin.optimizer)["groups"]}
    assert groups == pytest.approx(expected, abs=1024)  # ZeRO pads


def test_bytes_are_a_quarter(mesh: Mesh) -> None:
    eight = Layout("fsdp").engine(mesh)
    plain = tiny.build(mesh, "fsdp", tiny.OPTIMIZER, method=METHOD, model=MODEL)
    large = sum(
        math.prod(spec.shape)
        for name, spec in eight.specs.items()
        if spec.kind != "indices" and torch.Size(spec.shape).numel() >= 4096 and "norm" not in name
    )
    small = sum(p.numel() for p in plain.module.parameters() if p.requires_grad) - large
    assert plain.held_bytes()["moments"] == 8 * (large + small)
    expected = 8 * small + large * 2 * (1 + 4 / 256)
    assert eight.held_bytes()["moments"] == pytest.approx(expected, rel=1e-3)


def test_a_converted_checkpoint_keeps_codes_and_scales(mesh: Mesh, tmp_path: Path) -> None:
    """Cut into other files, in bfloat16: weights are rounded, 8-bit moments are not touched."""
    layout = Layout("fsdp")
    engine = layout.engine(mesh)
    tiny.train(engine, 0, 2)
    folder = save(engine, Progress(2, 0), layout.config(mesh, str(tmp_path / "run"))).folder
    assert folder is not None
    convert(folder, tmp_path / "small", dtype="bfloat16", shards=3)
    assert faults(tmp_path / "small") == []
    one, two = SavedMoments(folder), SavedMoments(tmp_path / "small")
    for name in one.names:
        shape = shapes(folder)[name]
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(one.read(name, moment, shape), two.read(name, moment, shape))
    convert(folder, tmp_path / "weights", weights_only=True)
    assert faults(tmp_path / "weights") == []
    fresh = layout.engine(mesh)
    resumed = load(tmp_path / "weights", fresh, layout.config(mesh, "unused"))
    assert any("weights only" in message for message in resumed.messages)
    assert all(not buffer.tensors["exp_avg_absmax"].any() for buffer in fresh.buffers())
