"""Any layout to any other: engine, data, tensor and sequence parallelism all change between save and resume.

Checkpoints of four layouts are read by four others. What is loaded is compared bit by bit with the files,
tensor by tensor; what is trained then, with the run that went on uninterrupted.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from sltrain_dist.config import DataConfig, TrainConfig
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.parallel.mesh import Mesh, close, initialise
from sltrain_dist.tools.checkpoint_report import faults
from sltrain_dist.train.checkpoint import Progress, load
from sltrain_dist.train.checkpoint_async import Saver
from sltrain_dist.train.checkpoint_shards import read_headers, read_rows
from tests.parallel import tiny
from tests.ranks import run_ranks

BEFORE, AFTER = 3, 10
MODEL = dataclasses.replace(tiny.SHARED, num_hidden_layers=1, vocab_size=tiny.MODEL.vocab_size)


class Layout(NamedTuple):
    """How four ranks (or the one of the test's own process) train."""

    kind: str
    tp: int = 1
    replicate: int = 1
    sequence: bool = False
    method: str = "fan_in"

    def mesh(self) -> Mesh:
        return initialise(device="cpu", tensor_parallel=self.tp, replicate=self.replicate)

    def engine(self, mesh: Mesh) -> Engine:
        changes = {"sequence_parallel": self.sequence}
        method = tiny.SHARED_METHODS[self.method]
        return tiny.build(mesh, self.kind, method=method, model=MODEL, **changes)

    def config(self, mesh: Mesh, folder: str) -> TrainConfig:
        engine = tiny.config(self.kind, mesh.dp_size, tensor_parallel=self.tp)
        return TrainConfig(
            model=MODEL,
            method=tiny.SHARED_METHODS[self.method],
            data=DataConfig(),
            optimizer=tiny.OPTIMIZER,
            engine=engine,
            save_dir=folder,
            async_save="yes",
        )


SAVES = {
    "fsdp-2x2-sp": Layout("fsdp", tp=2, sequence=True),
    "zero3-2x2": Layout("zero3", tp=2),
    "zero1-4x1-sp": Layout("zero1", tp=4, sequence=True),
    "hsdp-1x2x2": Layout("fsdp", replicate=2),
}
RESUMES = {
    "zero2-2x2-sp": Layout("zero2", tp=2, sequence=True),
    "fsdp-4x1": Layout("fsdp", tp=4),
    "zero3-1x4": Layout("zero3"),
    "zero0-2x2": Layout("zero0", tp=2),
}
Curve = list[float]


def save_all(mesh: Mesh, folder: str) -> dict[str, Curve]:
    """Train and save under each layout; how each goes on while its checkpoint is being written."""
    curves = {}
    for name, layout in SAVES.items():
        arranged = layout.mesh()
        engine = layout.engine(arranged)
        tiny.train(engine, 0, BEFORE)
        with Saver(arranged, layout.config(arranged, f"{folder}/{name}")) as saver:
            saver.save(engine, Progress(BEFORE, 0))
            curves[name] = [loss for loss, _ in tiny.train(engine, BEFORE, AFTER)]
            saver.wait()
            assert saver.stands
    return curves


def resume_all(mesh: Mesh, folder: str, layouts: dict[str, Layout], every: bool) -> dict[str, Any]:
    """{resume from save: (names of tensors that differ from the files, losses, messages)}.

    every: each layout reads all checkpoints, one after the other into the same engine; else one.
    """
    found = {}
    for number, (name, layout) in enumerate(layouts.items()):
        arranged = layout.mesh()
        engine = layout.engine(arranged)
        for source in SAVES if every else [list(SAVES)[number]]:
            checkpoint = Path(folder) / source / f"step_{BEFORE}"
            resumed = load(checkpoint, engine, layout.config(arranged, "unused"))
            different = differences(engine, checkpoint)
            losses = [loss for loss, _ in tiny.train(engine, resumed.progress.step, AFTER)]
            found[f"{name} from {source}"] = (different, losses, resumed.messages)
    return found


def differences(engine: Engine, checkpoint: Path) -> list[str]:
    stored = read_headers(checkpoint)
    state = {name: tensor.full_tensor() for name, tensor in engine.state().items()}
    assert state.keys() == stored.keys()
    return [
        name for name, whole in state.items() if not torch.equal(whole, read_rows(stored[name]))
    ]


def save_and_resume(mesh: Mesh, folder: str) -> tuple[dict[str, Curve], dict[str, Any]]:
    return save_all(mesh, folder), resume_all(mesh, folder, RESUMES, every=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Curve], dict[str, Any]]:
    """The folder of the checkpoints, the uninterrupted curves, and one resume for each save."""
    folder = str(tmp_path_factory.mktemp("layouts"))
    return (folder, *run_ranks(save_and_resume, 4, folder)[0])


def test_every_layout_writes_the_same_curve_and_whole_files(saved: Any) -> None:
    folder, curves, _ = saved
    first = curves["fsdp-2x2-sp"]
    for name, curve in curves.items():
        assert curve == pytest.approx(first, abs=1e-4), name
        assert faults(Path(folder) / name / f"step_{BEFORE}") == []
    assert first[0] - first[-1] > 0.5  # it trains
    headers = [read_headers(Path(folder) / name / f"step_{BEFORE}") for name in SAVES]
    assert all(h.keys() == headers[0].keys() for h in headers)
    assert all(h[name].shape == headers[0][name].shape for h in headers for name in h)


def check(results: dict[str, Any], curves: dict[str, Curve]) -> None:
    for pair, (different, losses, messages) in results.items():
        assert different == [], pair
        assert losses == pytest.approx(curves[pair.split(" from ")[1]], abs=1e-4), pair
        assert any("random states start anew" in line for line in messages), pair


def test_four_other_layouts_of_four_ranks_go_on(saved: Any) -> None:
    """Each reads one of the checkpoints, so that engine, degrees and sequence parallelism change."""
    _, curves, results = saved
    assert len(results) == 4
    check(results, curves)


@pytest.mark.slow
def test_every_pair_goes_on(saved: Any) -> None:
    folder, curves, _ = saved
    results = run_ranks(resume_all, 4, folder, RESUMES, True)[0]
    assert len(results) == 16
    check(results, curves)


def test_one_rank_goes_on(saved: Any) -> None:
    folder, curves, _ = saved
    mesh = initialise(device="cpu")
    try:
        results = resume_all(mesh, folder, {"one": Layout("fsdp")}, True)
    finally:
        close()
    check(results, curves)
    assert results["one from fsdp-2x2-sp"][2] == (
        "saved by 4 ranks of engine fsdp (tensor parallel 2), resumed by 1 of fsdp"
        " (tensor parallel 1): random states start anew, not bit-exact",
    )
