"""Inputs shared by the launcher tests."""

import contextlib
import os
import signal
import subprocess

import pytest

from tests.launcher import tiny


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_inputs(folder)
    return folder


@pytest.fixture
def bare(monkeypatch):
    """Run launcher/pretrain.py inside this process, as one process without a launcher."""
    from launcher import pretrain

    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores whatever the run sets
        monkeypatch.delenv(name)
    return pretrain.main


@pytest.fixture(scope="session")
def trained(inputs, tmp_path_factory):
    """A finished run of six updates with its last checkpoint; to be read, never written."""
    from launcher import pretrain

    folder = tmp_path_factory.mktemp("trained") / "run"
    before = dict(os.environ)
    code = pretrain.main(tiny.flags(inputs, folder, save_every=0, eval_every=0))
    os.environ.clear()
    os.environ.update(before)
    assert code == 0
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"needs to mount a file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def stop():
    """Stop a process; it is killed when the test has ended, however that was."""
    stopped = []

    def halt(process):
        stopped.append(process)
        os.kill(process, signal.SIGSTOP)

    yield halt
    for process in stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
