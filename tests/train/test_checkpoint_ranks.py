"""Checkpoints over real ranks: other world sizes read them, and one rank's bad luck is everybody's."""

import os
import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from sltrain_dist.parallel.mesh import Mesh, close, gather_objects, initialise
from sltrain_dist.train.checkpoint import Progress, find, load, save
from tests.ranks import run_ranks
from tests.train.fake_engine import FakeEngine, make_config


def write(mesh: Mesh, folder: str, step: int) -> None:
    progress = Progress(step, 100 * step, {"sample": step}, {"bytes": 7})
    saved = save(FakeEngine(mesh, step), progress, make_config(folder))
    assert saved.folder == Path(folder) / f"step_{step}", saved.warnings


def read(mesh: Mesh, folder: str, step: int) -> bool:
    """Whether the newest checkpoint holds ``step``; returns whether it was resumed exactly."""
    found = find(folder, Path("unused"), mesh)
    assert found.folder == Path(folder) / f"step_{step}"
    assert found.warnings == ()
    engine = FakeEngine(mesh, 0)
    resumed = load(found.folder, engine, make_config(folder))
    assert engine.holds(step)
    assert engine.loaded
    assert resumed.progress == Progress(step, 100 * step, {"sample": step}, {"bytes": 7})
    return resumed.exact


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def check_random_states(mesh: Mesh, folder: str) -> None:
    """Every rank gets its own random states back, not rank 0's."""
    random.seed(mesh.rank)
    np.random.seed(mesh.rank)
    torch.manual_seed(mesh.rank)
    random.gauss(0, 1)  # leaves a second value waiting inside the generator
    write(mesh, folder, 3)
    expected = draws()
    assert read(mesh, folder, 3)
    assert draws() == expected
    assert len(set(gather_objects(mesh, expected))) == mesh.world_size


def check_one_rank_without_room(mesh: Mesh, folder: str) -> None:
    """Only rank 1 cannot write: nobody publishes, the older checkpoint stands, the next save works."""
    write(mesh, folder, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mesh.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    saved = save(FakeEngine(mesh, 2), Progress(2, 2), make_config(folder))
    if mesh.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved.folder is None
    assert len(saved.warnings) == 1
    assert "rank 1" in saved.warnings[0]
    assert "still step_1" in saved.warnings[0]
    assert sorted(os.listdir(folder)) == ["latest", "step_1"]
    read(mesh, folder, 1)
    write(mesh, folder, 2)
    read(mesh, folder, 2)


def check_agreed_verdict(mesh: Mesh, folder: str) -> None:
    """One flipped byte, seen by the one rank that checks that file, moves all ranks to the older one."""
    write(mesh, folder, 1)
    write(mesh, folder, 2)
    victim = Path(folder) / "step_2" / "shard-00002-model-00001-of-00001.safetensors"
    if mesh.is_first:
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)
    gather_objects(mesh, None)
    found = find("auto", Path(folder), mesh)
    assert found.folder == Path(folder) / "step_1"
    assert len(found.warnings) == 1
    assert f"{victim.name}: checksum differs" in found.warnings[0]
    assert gather_objects(mesh, found) == [found] * mesh.world_size


def on_two_ranks(mesh: Mesh, folder: str) -> None:
    assert not read(mesh, f"{folder}/one", 5)
    write(mesh, f"{folder}/two", 6)
    check_random_states(mesh, f"{folder}/random")
    check_one_rank_without_room(mesh, f"{folder}/full")
    check_agreed_verdict(mesh, f"{folder}/flipped")


def on_three_ranks(mesh: Mesh, folder: str) -> None:
    assert not read(mesh, f"{folder}/two", 6)
    write(mesh, f"{folder}/three", 7)


@pytest.fixture
def mesh():
    yield initialise(device="cpu")
    close()


def test_every_world_size_reads_every_other(tmp_path: Path, mesh: Mesh) -> None:
    """1 -> 2 -> 3 -> 1 and 2 -> 1, with tensors shorter than the world and unevenly cut."""
    folder = str(tmp_path)
    write(mesh, f"{folder}/one", 5)
    run_ranks(on_two_ranks, 2, folder)
    run_ranks(on_three_ranks, 3, folder)
    assert not read(mesh, f"{folder}/two", 6)
    assert not read(mesh, f"{folder}/three", 7)
