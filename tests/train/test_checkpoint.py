"""Saving from one process: what is on the disk, what replaces what, what survives a full disk."""

import json
import os
import resource
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard

from sltrain_dist.parallel.mesh import Mesh, close, initialise
from sltrain_dist.train import checkpoint_folder, checkpoint_tensors
from sltrain_dist.train.checkpoint import Progress, find, load, save
from tests.train.fake_engine import SHARD, FakeEngine, holds, make_config, names, write


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield initialise(device="cpu")
    close()


def test_folder_has_no_pickle(mesh: Mesh, tmp_path: Path) -> None:
    """Every file is safetensors, JSON or the word in ``latest``: nothing that needs unpickling."""
    write(mesh, tmp_path, 4)
    assert names(tmp_path) == ["latest", "step_4"]
    assert (tmp_path / "latest").read_text() == "step_4\n"
    assert names(tmp_path / "step_4") == ["manifest.json", "rng-00000.json", SHARD, "state.json"]
    for path in (tmp_path / "step_4").glob("*.json"):
        json.loads(path.read_text())
    data = (tmp_path / "step_4" / SHARD).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    stored = max(entry["data_offsets"][1] for key, entry in header.items() if key[:2] != "__")
    assert 8 + length + stored == len(data)


def test_state_describes_the_run(mesh: Mesh, tmp_path: Path) -> None:
    write(mesh, tmp_path, 4)
    state = json.loads((tmp_path / "step_4" / "state.json").read_text())
    assert state["support_hash"] == "fffffffffffffffb"  # of -5: 64 bits, unsigned
    assert state["method"]["rank"] == 2
    assert state["config"]["save_dir"] == str(tmp_path)
    assert state["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert state["tensors"]["model.lm_head.weight"] == {"shape": [6, 3], "dtype": "bfloat16"}


def test_several_files_per_rank(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank's part is split, so that writing never holds a second copy of all of it."""
    monkeypatch.setattr(checkpoint_tensors, "FILE_BYTES", 100)
    write(mesh, tmp_path, 4)
    assert len(list((tmp_path / "step_4").glob("*.safetensors"))) > 2
    assert holds(mesh, tmp_path / "step_4", 4)


def test_keep_last(mesh: Mesh, tmp_path: Path) -> None:
    for step in (1, 2, 10):
        write(mesh, tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["latest", "step_10", "step_2"]


def test_same_step_again_replaces(mesh: Mesh, tmp_path: Path) -> None:
    write(mesh, tmp_path, 1)
    engine = FakeEngine(mesh, 8)
    assert save(engine, Progress(1, 1), make_config(str(tmp_path))).folder is not None
    assert names(tmp_path) == ["latest", "step_1"]
    loaded = FakeEngine(mesh, 0)
    load(tmp_path / "step_1", loaded, make_config(str(tmp_path)))
    assert loaded.holds(8)


def test_killed_between_the_two_renames_of_a_replacement(mesh: Mesh, tmp_path: Path) -> None:
    write(mesh, tmp_path, 1)
    os.rename(tmp_path / "step_1", tmp_path / "step_1.replaced")
    for target in ("auto", str(tmp_path)):
        assert holds(mesh, find(target, tmp_path, mesh).folder, 1)
    write(mesh, tmp_path, 2)
    assert names(tmp_path) == ["latest", "step_1", "step_2"]


def test_leftovers_of_killed_runs_go(mesh: Mesh, tmp_path: Path) -> None:
    write(mesh, tmp_path, 1)
    for leftover in ("step_2.tmp", "step_0.deleted.tmp", "step_1.replaced"):
        shutil.copytree(tmp_path / "step_1", tmp_path / leftover)
    (tmp_path / "latest.tmp").write_text("step_2")
    (tmp_path / "notes.tmp").write_text("not ours")
    assert find("auto", tmp_path, mesh).folder == tmp_path / "step_1"
    write(mesh, tmp_path, 2)
    assert names(tmp_path) == ["latest", "notes.tmp", "step_1", "step_2"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB; where mounting is not permitted, a limit on the size of files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)]
    if shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0:
        yield disk
        subprocess.run(["umount", "-l", str(disk)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_full(mesh: Mesh, small_disk: Path) -> None:
    """The save fails as a whole with one line; the good checkpoint stands; room again, saves again."""
    assert write(mesh, small_disk, 1).folder is not None
    big = FakeEngine(mesh, 2)
    big.replace("optimizer.exp_avg.big", (100_000,), torch.float32)
    for _ in range(2):
        saved = save(big, Progress(2, 2), make_config(str(small_disk)))
        assert saved.folder is None
        (warning,) = saved.warnings
        assert "step_2 was not saved: " in warning
        assert "No space left on device" in warning or "File too large" in warning
        assert warning.endswith("the newest checkpoint is still step_1")
        assert names(small_disk) == ["latest", "step_1"]
    assert holds(mesh, find("auto", small_disk, mesh).folder, 1)
    assert write(mesh, small_disk, 3, keep_last=1).folder is not None
    assert names(small_disk) == ["latest", "step_3"]


def test_disk_full_at_every_file(mesh: Mesh, small_disk: Path) -> None:
    """With room for ever fewer pages each file in turn is the one that does not fit; none is published."""
    if not os.path.ismount(small_disk):
        pytest.skip("mounting is not permitted here")
    assert write(mesh, small_disk, 1).folder is not None
    filler, outcomes = small_disk / "filler", []
    for pages in range(1, 24):
        free = os.statvfs(small_disk).f_bavail
        filler.write_bytes(b"x" * 4096 * (free - pages))
        saved = write(mesh, small_disk, 2)
        outcomes.append(saved.folder is not None)
        expected = ["filler", "latest", "step_1"] + ["step_2"] * outcomes[-1]
        assert names(small_disk) == expected
        found = find("auto", small_disk, mesh)
        assert found.warnings == ()
        assert holds(mesh, found.folder, 1 + outcomes[-1])
        filler.unlink()
        if outcomes[-1]:
            break
    assert len(outcomes) > 5
    assert outcomes[-1]


def test_old_checkpoint_that_cannot_go(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new checkpoint counts even where the old one could not be deleted."""

    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    write(mesh, tmp_path, 1)
    monkeypatch.setattr(checkpoint_folder, "discard", refuse)
    saved = write(mesh, tmp_path, 2, keep_last=1)
    assert saved.folder == tmp_path / "step_2"
    assert "could not be deleted: Permission denied: step_1" in saved.warnings[0]


def test_strided_shards(mesh: Mesh, tmp_path: Path) -> None:
    engine = FakeEngine(mesh, 3)
    for name, tensor in engine.tensors.items():
        if tensor.dim() == 2:
            local = tensor.to_local().t().contiguous().t()
            engine.tensors[name] = DTensor.from_local(local, mesh.device_mesh, [Shard(0)])
    assert save(engine, Progress(3, 3), make_config(str(tmp_path))).folder is not None
    assert holds(mesh, tmp_path / "step_3", 3)


def test_save_dir_that_cannot_be(mesh: Mesh, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    saved = write(mesh, tmp_path / "file" / "run", 1)
    assert saved.folder is None
    assert "newest checkpoint is still none" in saved.warnings[0]
