"""Runs as a user starts them, whose processes tests may then find, pause, signal and wait for."""

import contextlib
import json
import os
import subprocess
import sys
import time

from sltrain_dist.parallel.mesh import free_port
from tests.launcher.tiny import REPOSITORY, metrics

FAULTY = "tests/launcher/faulty.py"
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def start(command, **variables):
    """Start Python with these arguments and, beside the environment, these variables."""
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=environment | {"OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def torchrun(ranks, *arguments):
    port = f"--master_port={free_port()}"
    return ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", port, *arguments]


def end(process, seconds=240):
    """(exit code, everything it printed), once it has ended."""
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def wait_until(holds, process, seconds=180):
    """Wait until ``holds()``; fails where the process (None: none) ends before, or it takes too long."""
    until = time.monotonic() + seconds
    while not holds():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)


def pause_file(folder, rank=0):
    """What tests.launcher.faulty writes where it pauses; removing it lets the rank go on."""
    return folder / f"paused-{rank}"


def rank_process(rank, run):
    """The process that is this rank of the run in that folder."""
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/environ", "rb") as file:
                environment = file.read().split(b"\0")
            with open(f"/proc/{process}/cmdline", "rb") as file:
                command = file.read().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in environment and str(run).encode() in command:
            return int(process)
    raise AssertionError(f"no process is rank {rank} of {run}")


def heartbeat(run):
    return json.loads((run / "heartbeat.json").read_text())


def events(run, *kinds):
    """The events of a run, of these kinds or all."""
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if not kinds or line["event"] in kinds]


def curve(run):
    """(step, loss, held-out loss) of every line of the metrics, each there once."""
    lines = [(x["step"], x.get("loss"), x.get("eval_loss")) for x in metrics(run)]
    assert len(set(lines)) == len(lines)
    return sorted(lines, key=str)


def fill(disk):
    """Leave no room on it; the file to remove for some."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), open(ballast, "wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    return ballast
