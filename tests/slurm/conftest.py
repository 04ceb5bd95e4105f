"""One cluster for the session, and jobs on it whose logs are shown when a test fails."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.launcher import tiny
from tests.slurm.cluster import Cluster, missing

UPDATES = 40


@pytest.fixture(scope="session")
def cluster():
    if reason := missing():
        print(f"no SLURM: {reason}")
        pytest.skip(f"no SLURM: {reason}")
    with Cluster() as running:
        yield running


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_inputs(folder)
    return folder


class Job:
    """A submitted job script of this project, its run folder and its log."""

    def __init__(
        self, cluster: Cluster, script: str, inputs: Path, run: Path, *flags: str, **given
    ):
        self.cluster, self.run, self.log = cluster, run, run.with_suffix(".log")
        variables = {
            "MODEL": str(inputs / "model.json"),
            "SAVE_DIR": str(run),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "PROGRAM": "tests/slurm/paced.py",
            "PROCESSES_PER_NODE": "1",
        } | given
        settings = {"num_training_steps": UPDATES, "eval_every": 0, "save_every": 10, "model": None}
        self.number = cluster.command(
            *("sbatch", "--parsable", f"--chdir={tiny.REPOSITORY}", f"--output={self.log}"),
            *("--nodes=2", "--gpus-per-node=1", f"slurm/{script}.sbatch"),
            *tiny.flags(inputs, None, **settings),
            *flags,
            **variables,
        )  # fmt: skip

    def ended(self, seconds: float = 400) -> str:
        """Wait for the end; the state and exit status that SLURM reports, as "FAILED 1:0"."""
        known = self.cluster.ended(self.number, seconds)
        return f"{known['JobState']} {known['ExitCode']}"

    def trained(self, updates: int, seconds: float = 200) -> None:
        """Wait until the run has done so many updates."""
        self.cluster.until(
            lambda: (
                max(tiny.losses(self.run), default=0) >= updates
                if (self.run / "metrics.jsonl").exists()
                else False
            ),
            seconds,
            f"update {updates}",
        )

    def requeued(self, times: int, seconds: float = 200) -> None:
        """Wait until SLURM has put the job back so often."""
        self.cluster.until(
            lambda: self.restarts >= times, seconds, f"requeue {times} of job {self.number}"
        )

    def restarted(self, times: int, seconds: float = 200) -> None:
        """Wait until it runs again after that."""
        self.requeued(times, seconds)
        self.cluster.until(
            lambda: self.cluster.job(self.number)["JobState"] == "RUNNING", seconds, "a restart"
        )

    def heartbeat(self) -> dict[str, Any]:
        """What the run said of itself last."""
        return json.loads((self.run / "heartbeat.json").read_text())

    @property
    def restarts(self) -> int:
        """How often SLURM requeued it."""
        return int(self.cluster.job(self.number)["Restarts"])


@pytest.fixture(scope="session")
def submit(cluster, inputs, tmp_path_factory):
    """``with submit("pretrain_7b", *flags, **variables) as job``: cleared away afterwards."""

    @contextmanager
    def submitted(script: str, *flags: str, **variables: str) -> Iterator[Job]:
        job = Job(
            cluster, script, inputs, tmp_path_factory.mktemp("job") / "run", *flags, **variables
        )
        try:
            yield job
        except BaseException:
            text = job.log.read_text(errors="replace") if job.log.exists() else "(none)"
            print(f"== {job.log}\n{text[-20000:]}\n{cluster.logs()}\n{cluster.job(job.number)}")
            raise
        finally:
            cluster.command("scancel", "--signal=KILL", "--full", job.number, check=False)
            cluster.command("scancel", job.number, check=False)
            cluster.repair()
            cluster.until(lambda: not cluster.command("squeue", "-h"), 60, "an empty queue")

    return submitted
