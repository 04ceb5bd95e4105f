"""Script for test_checkpoint_kill: processes die by SIGKILL while saving; what is left must be whole.

    python -m tests.train.killed_saves FOLDER {every_operation,random_moments,one_of_two} SEED

Trials are forked from one process that has imported torch but never used it, which makes a trial
cost a tenth of a second. Prints one JSON line: trials, kills, and how often each kind of outcome was seen.
"""

import collections
import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import safetensors.torch  # noqa: F401 (these two: else every trial would import them again)
import torch
import torch._dynamo

from sltrain_dist.parallel.mesh import Mesh, free_port, initialise
from sltrain_dist.train.checkpoint import Progress, find, load, save
from sltrain_dist.train.checkpoint_async import Saver
from tests.train.fake_engine import FakeEngine, make_config

BIG = "optimizer.exp_avg.big"
SIZES = {"every_operation": 1000, "random_moments": 1_000_000, "one_of_two": 2_000_000}  # of BIG
FILE_EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


def make_engine(mesh: Mesh, step: int) -> FakeEngine:
    """The fake engine with a large tensor more, so that a kill can fall inside the write of a file."""
    engine = FakeEngine(mesh, step)
    engine.replace(BIG, (SIZES[sys.argv[2]],), torch.float32)
    engine.tensors[BIG].to_local().fill_(float(step))
    return engine


def fork(body: Callable[[int], Any]) -> tuple[int, int]:
    """Run ``body(write end of a pipe)`` in a forked process; returns its id and the read end."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code = 1
        try:
            body(writer)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    return pid, reader


def killed(pid: int) -> bool:
    """Wait for a process; whether it was killed. Any other failure is an error of the test."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "a trial raised; see above"
    return False


def check(folder: Path) -> tuple[int, int]:
    """(step, content) of the checkpoint ``auto`` finds, whose every byte is right, without a warning."""

    def body(pipe: int) -> None:
        mesh = initialise(device="cpu")
        found = find("auto", folder, mesh)
        assert found.folder is not None
        assert found.warnings == (), found.warnings
        engine = make_engine(mesh, 0)
        step = load(found.folder, engine, make_config(str(folder))).progress.step
        content = engine.count
        assert engine.holds(content)
        assert bool((engine.tensors[BIG].to_local() == float(content)).all())
        by_folder = find(str(folder), folder, mesh)  # the user's way, through ``latest``
        assert by_folder.folder is not None
        os.write(pipe, f"{step} {content}".encode())

    pid, reader = fork(body)
    assert not killed(pid)
    step, content = map(int, os.read(reader, 100).split())
    os.close(reader)
    return step, content


def save_beside(folder: Path, rank: int, port: int, first: int, keep_last: int, pipe: int) -> None:
    """One of two ranks that save beside training without end; reports every step that stands."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    mesh = initialise(timeout=60.0, device="cpu")
    config = dataclasses.replace(make_config(str(folder), keep_last), async_save="yes")
    with Saver(mesh, config) as saver:
        for step in itertools.count(first):
            engine = make_engine(mesh, step)
            saver.save(engine, Progress(step, step))
            for tensor in engine.tensors.values():  # the next update
                tensor.to_local().zero_()
            if step > first and saver.stands:
                os.write(pipe, (step - 1).to_bytes(4, "little"))


def one_of_two(folder: Path, seed: int, kills: int = 5) -> dict[str, Any]:
    """Kill one rank of two while both save beside training: the other one ends by itself, nothing is lost."""
    draw = random.Random(seed)
    step, inside, victims = 0, 0, [0, 1] * kills
    for victim in victims[:kills]:
        port, keep_last = free_port(), draw.choice((0, 2))
        ranks = [
            fork(
                lambda pipe, r=rank, s=step + 1, p=port, k=keep_last: save_beside(
                    folder, r, p, s, k, pipe
                )
            )
            for rank in (0, 1)
        ]
        reported = os.read(ranks[0][1], 4)
        assert reported, "a trial ended before its first save"
        time.sleep(draw.uniform(0, 0.3))
        os.kill(ranks[victim][0], signal.SIGKILL)
        assert killed(ranks[victim][0])
        _, status = os.waitpid(ranks[1 - victim][0], 0)
        assert os.WIFEXITED(status), "the rank that was left did not end by itself"
        assert os.WEXITSTATUS(status) == 1, "the rank that was left saw no error"
        while data := os.read(ranks[0][1], 4096):
            reported += data
        for _, reader in ranks:
            os.close(reader)
        inside += bool(list(folder.glob("*.tmp")))
        step, _ = check(folder)
        assert step >= int.from_bytes(reported[-4:], "little"), "a finished save was lost"
    return {"kills": kills, "left a .tmp": inside, "last step": step}


def save_steps(
    folder: Path,
    saves: Iterable[tuple[int, int]],
    keep_last: int,
    pipe: int,
    kill_at: int = 0,
) -> None:
    """Save (step, content) one after the other and report each; die before file operation ``kill_at``."""
    mesh = initialise(device="cpu")
    count = itertools.count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        ours = event in FILE_EVENTS or (
            event == "open" and str(arguments[0]).startswith(str(folder))
        )
        if ours and next(count) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    if kill_at:
        sys.addaudithook(hook)
    for step, content in saves:
        engine = make_engine(mesh, content)
        saved = save(engine, Progress(step, step), make_config(str(folder), keep_last))
        assert saved.folder is not None, saved.warnings
        os.write(pipe, step.to_bytes(4, "little"))


def every_operation(folder: Path) -> dict[str, Any]:
    """Kill before each file operation of a save in turn: of a new step, and of one that replaces."""
    base = folder / "base"
    pid, reader = fork(lambda pipe: save_steps(base, ((1, 1), (2, 2)), 0, pipe))
    assert not killed(pid)
    os.close(reader)
    results: dict[str, Any] = {}
    trials = (("new step, older pruned", (3, 3), 1), ("same step again", (2, 9), 2))
    for name, new, keep_last in trials:
        outcomes: collections.Counter[str] = collections.Counter()
        for kill_at in itertools.count(1):
            run = folder / "run"
            shutil.copytree(base, run)
            pid, reader = fork(
                lambda pipe, k=kill_at, n=new, last=keep_last, r=run: save_steps(
                    r, (n,), last, pipe, k
                )
            )
            died = killed(pid)
            os.close(reader)
            found = check(run)
            assert found in ((2, 2), new), found
            shutil.rmtree(run)
            outcomes[("new" if found == new else "old") + (", killed" if died else "")] += 1
            if not died:
                assert found == new
                break
        results[name] = outcomes
    return results


def random_moments(folder: Path, seed: int, kills: int = 15) -> dict[str, Any]:
    """Kill a process that saves in a loop, anywhere; the next one goes on from what is found."""
    draw = random.Random(seed)
    step, inside = 0, 0
    for _ in range(kills):
        start = step + 1
        pid, reader = fork(
            lambda pipe, s=start: save_steps(
                folder, zip(itertools.count(s), itertools.count(s)), draw.choice((0, 2)), pipe
            )
        )
        first = os.read(reader, 4)
        assert first, "a trial ended before its first save"
        time.sleep(draw.uniform(0, 0.15))
        os.kill(pid, signal.SIGKILL)
        assert killed(pid)
        reported = first
        while data := os.read(reader, 4096):
            reported += data
        os.close(reader)
        inside += bool(list(folder.glob("*.tmp")))
        step, _ = check(folder)
        assert step >= int.from_bytes(reported[-4:], "little"), "a finished save was lost"
    return {"kills": kills, "left a .tmp": inside, "last step": step}


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, mode = Path(sys.argv[1]), sys.argv[2]
    if mode == "every_operation":
        outcome = every_operation(target)
    else:
        trial = random_moments if mode == "random_moments" else one_of_two
        outcome = trial(target, int(sys.argv[3]))
    print(json.dumps(outcome))
