"""Method slope's second masks in checkpoints: restored to the bit on any layout, not made again from the weights.

Saves fall between two choices of the masks, so that the masks are older than the weights beside them.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sltrain_dist.parallel.mesh import Mesh, close, initialise
from sltrain_dist.tools.checkpoint_report import faults
from sltrain_dist.train.checkpoint import Progress, find, load, save
from sltrain_dist.train.checkpoint_shards import read_headers
from sltrain_dist.utils.errors import UserError
from tests.parallel import tiny
from tests.ranks import run_ranks
from tests.train.test_checkpoint_layouts import Layout, check, differences

BEFORE, AFTER = 4, 6  # masks are chosen after 3, 6 and 9
SAVES = {
    "fsdp-1x2": Layout("fsdp", method="slope"),
    "fsdp-2x1-sp": Layout("fsdp", tp=2, sequence=True, method="slope"),
    "zero1-1x2": Layout("zero1", method="slope"),
    "zero3-1x2": Layout("zero3", method="slope"),
}
RESUMES = {
    "zero3-2x1": (Layout("zero3", tp=2, method="slope"), "fsdp-1x2"),
    "zero0-1x2": (Layout("zero0", method="slope"), "fsdp-2x1-sp"),
    "hsdp-2": (Layout("fsdp", replicate=2, method="slope"), "zero3-1x2"),
    "zero2-2x1": (Layout("zero2", tp=2, method="slope"), "zero1-1x2"),
}


def masks(engine: Any) -> dict[str, torch.Tensor]:
    state = engine.state()
    return {n: t.full_tensor().clone() for n, t in state.items() if n.endswith(".backward")}


def resume(layout: Layout, folder: str, source: str) -> tuple[list[str], list[float], tuple[str, ...]]:  # fmt: skip
    """Names of tensors that are not as in the files, the losses that follow, and what was said."""
    mesh = layout.mesh()
    engine = layout.engine(mesh)
    tiny.train(engine, 0, 1)  # so that nothing is right by chance
    checkpoint = Path(folder) / source / f"step_{BEFORE}"
    resumed = load(checkpoint, engine, layout.config(mesh, "unused"))
    different, restored = differences(engine, checkpoint), masks(engine)
    engine.choose_masks()
    anew = masks(engine)
    assert any(not torch.equal(anew[name], restored[name]) for name in restored)
    load(checkpoint, engine, layout.config(mesh, "unused"))
    losses = [loss for loss, _ in tiny.train(engine, BEFORE, AFTER)]
    return different, losses, resumed.messages


def save_and_resume(mesh: Mesh, folder: str, pairs: list[tuple[str, Layout, str]]) -> Any:
    curves, found = {}, {}
    for name, layout in SAVES.items():
        arranged = layout.mesh()
        engine = layout.engine(arranged)
        tiny.train(engine, 0, BEFORE)
        config = layout.config(arranged, f"{folder}/{name}")
        assert save(engine, Progress(BEFORE, 0), config).folder is not None
        curves[name] = [loss for loss, _ in tiny.train(engine, BEFORE, AFTER)]
    for name, layout, source in pairs:
        found[f"{name} from {source}"] = resume(layout, folder, source)
    return curves, found


def run(folder: str, pairs: list[tuple[str, Layout, str]]) -> Any:
    curves, results = run_ranks(save_and_resume, 2, folder, pairs, timeout=900)[0]
    first = curves["fsdp-1x2"]
    for name, curve in curves.items():
        assert curve == pytest.approx(first, abs=1e-4), name
        assert faults(Path(folder) / name / f"step_{BEFORE}") == []
        headers = read_headers(Path(folder) / name / f"step_{BEFORE}")
        assert sum(tensor.endswith(".backward") for tensor in headers) == 7
        assert not any(tensor.endswith(".offsets") for tensor in headers)
    check(results, curves)
    return curves


def test_masks_are_restored_on_other_layouts(tmp_path: Path) -> None:
    pairs = [(name, layout, source) for name, (layout, source) in RESUMES.items()]
    curves = run(str(tmp_path), pairs)
    mesh = initialise(device="cpu")
    try:
        for source in ("fsdp-2x1-sp", "zero3-1x2"):
            found = resume(Layout("fsdp", method="slope"), str(tmp_path), source)
            check({f"one from {source}": found}, curves)
        refuse_others(mesh, tmp_path)
    finally:
        close()


def refuse_others(mesh: Mesh, folder: Path) -> None:
    """Another pattern, and a checkpoint that lacks its masks."""
    layout = Layout("fsdp", method="slope")
    checkpoint = folder / "zero3-1x2" / f"step_{BEFORE}"
    engine = layout.engine(mesh)
    config = layout.config(mesh, "unused")
    other = dataclasses.replace(config, method=dataclasses.replace(config.method, pattern="1:4"))
    with pytest.raises(UserError, match=r"trained with --slope_pattern 2:4, this run has --slope_pattern 1:4"):  # fmt: skip
        load(checkpoint, engine, other)
    copy = shutil.copytree(folder / "zero3-1x2", folder / "copy")
    victim = next((copy / f"step_{BEFORE}").glob("shard-*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-64])
    with pytest.raises(UserError, match="no whole checkpoint"):
        find(str(copy), folder, mesh)


def exact(mesh: Mesh, folder: str) -> bool:
    """The same layout goes on to the bit."""
    layout = Layout("zero3", method="slope")
    arranged = layout.mesh()
    engine = layout.engine(arranged)
    tiny.train(engine, 0, BEFORE)
    assert save(engine, Progress(BEFORE, 0), layout.config(arranged, folder)).folder
    uninterrupted = tiny.train(engine, BEFORE, AFTER)
    again = layout.engine(arranged)
    resumed = load(Path(folder) / f"step_{BEFORE}", again, layout.config(arranged, folder))
    assert resumed.exact
    return tiny.train(again, BEFORE, AFTER) == uninterrupted


def test_the_same_layout_goes_on_to_the_bit(tmp_path: Path) -> None:
    assert run_ranks(exact, 2, str(tmp_path)) == [True, True]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_pair(tmp_path: Path) -> None:
    layouts = {name: layout for name, (layout, _) in RESUMES.items()} | SAVES
    run(str(tmp_path), [(name, at, source) for name, at in layouts.items() for source in SAVES])
