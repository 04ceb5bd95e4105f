"""SIGKILL while saving: at every file operation and at random moments. A whole checkpoint is always found."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is /dev/shm: a killed process loses nothing of any file system's cache."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def run(mode: str, folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "tests.train.killed_saves", str(folder), mode, "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def test_killed_before_every_file_operation(fast_folder: Path) -> None:
    """Either the old checkpoint or the new one, never neither; and both were seen."""
    for outcomes in run("every_operation", fast_folder).values():
        assert outcomes["old, killed"] > 10  # before the rename: the old one
        assert outcomes["new, killed"] > 0  # after it: the new one


def test_killed_at_random_moments(fast_folder: Path) -> None:
    """15 kills of a process that saves in a loop; no save that had returned is ever lost."""
    outcome = run("random_moments", fast_folder)
    assert outcome["kills"] == 15
    assert outcome["left a .tmp"] > 0  # some fell inside a save


def test_one_of_two_ranks_killed_while_saving_beside_training(fast_folder: Path) -> None:
    """The rank that is left ends with an error instead of waiting; every save that stood still stands."""
    outcome = run("one_of_two", fast_folder)
    assert outcome["kills"] == 5
    assert outcome["left a .tmp"] > 0  # some fell inside the write
