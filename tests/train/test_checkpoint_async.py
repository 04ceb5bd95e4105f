"""Saving beside training: the same bytes, one copy of the shards, no error lost, training not disturbed."""

import dataclasses
import hashlib
import json
import os
import re
import resource
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sltrain_dist.config import DataConfig, TrainConfig
from sltrain_dist.parallel.mesh import Mesh, gather_objects
from sltrain_dist.train import checkpoint_async
from sltrain_dist.train.checkpoint import Progress, find, load, save
from sltrain_dist.train.checkpoint_async import Saver
from sltrain_dist.train.checkpoint_folder import read_manifest
from tests.parallel import tiny
from tests.ranks import run_ranks
from tests.train.fake_engine import FakeEngine, make_config

BIG = "optimizer.exp_avg.big"
BIG_ROWS = 3_000_000  # a save of so many float32 takes longer than to come back with the next one


def beside(folder: str, keep_last: int = 0, asked: str = "yes") -> TrainConfig:
    return dataclasses.replace(make_config(folder, keep_last), async_save=asked)


def tensor_files(folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Header (safetensors writes its keys in any order) and checksum of the data of every tensor file."""
    files = {}
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        end = 8 + struct.unpack("<Q", content[:8])[0]
        files[path.name] = (json.loads(content[8:end]), hashlib.sha256(content[end:]).hexdigest())
    assert files.keys() <= read_manifest(folder).files.keys()
    return files


def big_engine(mesh: Mesh, step: int) -> FakeEngine:
    engine = FakeEngine(mesh, step)
    engine.replace(BIG, (BIG_ROWS,), torch.float32)
    engine.tensors[BIG].to_local().fill_(float(step))
    return engine


def step_on(engine: FakeEngine) -> None:
    """What the next update does: everything changes in place."""
    for tensor in engine.tensors.values():
        tensor.to_local().zero_()
    torch.rand(3)


def check_same_bytes_and_memory(mesh: Mesh, folder: str) -> list[str]:
    """Two saves, the second while the first is being written, each overwritten at once; returns the lines."""
    lines, places = [], set()
    for step in (1, 2):
        save(big_engine(mesh, step), Progress(step, step), make_config(f"{folder}/between"))
    engines = [big_engine(mesh, step) for step in (1, 2)]
    with Saver(mesh, beside(f"{folder}/beside")) as saver:
        for step, engine in enumerate(engines, 1):
            random = torch.get_rng_state()
            lines += saver.save(engine, Progress(step, step))
            step_on(engine)
            shards = sum(tensor.to_local().nbytes for tensor in engine.tensors.values())
            assert shards <= saver.copies.nbytes < shards + 64 * len(engine.tensors)
            places.add(saver.copies._memory.data_ptr())
        assert len(places) == 1  # the same memory both times
        lines += saver.wait()
        assert saver.stands
    assert saver.copies.nbytes == 0
    for step in (1, 2):
        ours = Path(folder) / "beside" / f"step_{step}"
        assert tensor_files(ours) == tensor_files(Path(folder) / "between" / f"step_{step}")
        assert len(tensor_files(ours)) == mesh.world_size
    loaded = big_engine(mesh, 0)
    assert load(ours, loaded, beside("x")).exact
    assert loaded.holds(2)
    assert torch.equal(torch.get_rng_state(), random)  # of the moment, not of the end of the write
    return lines


def check_full_disk(mesh: Mesh, folder: str) -> None:
    """Rank 1 alone runs out of room in its thread: told at the next look, and the run can save again."""
    config = beside(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Saver(mesh, config) as saver:
        saver.save(FakeEngine(mesh, 1), Progress(1, 1))
        saver.wait()
        if mesh.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
        saver.save(FakeEngine(mesh, 2), Progress(2, 2))
        (line,) = saver.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert line.startswith("warning: ")
        assert "step_2 was not saved" in line
        assert "rank 1" in line
        assert "still step_1" in line
        assert not saver.stands
        assert sorted(os.listdir(folder)) == ["latest", "step_1"]
        saver.save(FakeEngine(mesh, 3), Progress(3, 3))
        assert saver.wait() == [f"step 3: saved {folder}/step_3"]
        assert saver.stands


def check_keep_last(mesh: Mesh, folder: str) -> None:
    with Saver(mesh, beside(folder, keep_last=2)) as saver:
        for step in (1, 2, 10, 11):
            saver.save(FakeEngine(mesh, step), Progress(step, step))
        saver.wait()
    assert sorted(os.listdir(folder)) == ["latest", "step_10", "step_11"]


def check_error_in_the_thread(mesh: Mesh, folder: str) -> None:
    """A tensor that no file format holds: the exception comes out of ``poll``, on every rank."""
    engine = FakeEngine(mesh, 1)
    engine.replace("optimizer.phase", (8,), torch.complex128)
    with Saver(mesh, beside(folder)) as saver:
        saver.save(engine, Progress(1, 1))
        while not saver._flight.ended:
            time.sleep(0.01)
        with pytest.raises(RuntimeError, match=r"writing .* failed"):
            saver.poll()
        saver.save(FakeEngine(mesh, 2), Progress(2, 2))
        saver.wait()
        saver.save(engine, Progress(3, 3))
        with pytest.raises(RuntimeError, match="failed"):
            saver.save(FakeEngine(mesh, 4), Progress(4, 4))


def fail_while_saving(mesh: Mesh, folder: str) -> None:
    with Saver(mesh, beside(folder)) as saver:
        saver.save(big_engine(mesh, 1), Progress(1, 1))
        raise ZeroDivisionError


def check_training_that_fails(mesh: Mesh, folder: str) -> None:
    """A save in flight is finished, though the update after it raises."""
    with pytest.raises(ZeroDivisionError):
        fail_while_saving(mesh, folder)
    gather_objects(mesh, None)
    assert find("auto", Path(folder), mesh).folder == Path(folder) / "step_1"


def on_two_ranks(mesh: Mesh, folder: str) -> list[str]:
    lines = check_same_bytes_and_memory(mesh, f"{folder}/same")
    check_full_disk(mesh, f"{folder}/full")
    check_keep_last(mesh, f"{folder}/keep")
    check_error_in_the_thread(mesh, f"{folder}/error")
    check_training_that_fails(mesh, f"{folder}/fails")
    return lines


def test_two_ranks(tmp_path: Path) -> None:
    for lines in run_ranks(on_two_ranks, 2, str(tmp_path)):
        memory, waited, first, second = lines
        assert re.search(
            r"beside training; the copy takes \d\.\d MiB of host memory a rank", memory
        )
        assert re.fullmatch(r"step 2: waited \d+\.\d s for the checkpoint before this one", waited)
        assert first.startswith("step 1: saved")
        assert second.startswith("step 2: saved")


def without_room(mesh: Mesh, folder: str) -> list[list[str]]:
    """Copies as large as all of the memory of this machine, in the eyes of the check."""
    checkpoint_async._WRITING = 1 << 60
    found = []
    for asked in ("yes", "auto", "no"):
        with Saver(mesh, beside(f"{folder}/{asked}", asked=asked)) as saver:
            lines = saver.save(FakeEngine(mesh, 1), Progress(1, 1))
            assert saver.copies.nbytes == 0
            assert saver.wait() == []
        found.append(lines)
    return found


def test_without_room_or_wish_saves_are_synchronous(tmp_path: Path) -> None:
    ((yes, auto, no),) = run_ranks(without_room, 1, str(tmp_path))
    assert yes[0].startswith("warning: --async_save yes: the copies of all ranks on ")
    assert "GiB are available; checkpoints are written between updates" in yes[0]
    assert auto[0] == "checkpoints are written between updates (on a CPU, --async_save auto)"
    saved = [[line for line in lines if "saved" in line] for lines in (yes, auto, no)]
    assert saved == [
        [f"step 1: saved {tmp_path}/{asked}/step_1"] for asked in ("yes", "auto", "no")
    ]
    assert len(no) == 1


def tiny_config(mesh: Mesh, kind: str, folder: str) -> TrainConfig:
    return TrainConfig(
        model=tiny.SMALL,
        method=tiny.METHOD,
        data=DataConfig(),
        optimizer=tiny.OPTIMIZER,
        engine=tiny.config(kind, mesh.dp_size),
        save_dir=folder,
        keep_last=0,
        async_save="yes",
    )


def train_and_save(mesh: Mesh, folder: str) -> list[str]:
    """What saves beside training have changed: the losses, the files, or memory that stays taken."""
    wrong = []
    for kind in ("fsdp", "zero2"):  # zero2's state is a copy, which is not copied again
        config = tiny_config(mesh, kind, f"{folder}/{kind}")
        between = dataclasses.replace(config, save_dir=f"{folder}/{kind}-between")
        alone = tiny.train(tiny.build(mesh, kind), 0, 4)
        engine, losses = tiny.build(mesh, kind), []
        with Saver(mesh, config) as saver:
            for number in range(4):
                losses += tiny.train(engine, number, 1)
                saver.poll()
                if number == 2:
                    save(engine, Progress(3, 3), between)
                saver.save(engine, Progress(number + 1, 0))
            saver.wait()
            shards = sum(tensor.to_local().nbytes for tensor in engine.state().values())
            if (saver.copies.nbytes >= shards) != (kind == "fsdp"):
                wrong.append(f"{kind}: copies of {saver.copies.nbytes} bytes")
        files = tensor_files(Path(config.save_dir) / "step_3")
        if losses != alone or files != tensor_files(Path(between.save_dir) / "step_3"):
            wrong.append(kind)
    return wrong


def test_training_is_not_disturbed(tmp_path: Path) -> None:
    """Bit-equal losses beside a run without saves; the files of a synchronous save of the same moment."""
    assert run_ranks(train_and_save, 2, str(tmp_path)) == [[], []]
