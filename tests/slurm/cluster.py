"""A throw-away SLURM on loopback: slurmctld and two slurmd, each on a machine of its own (machines.py).

Needs root and Debian's slurmctld, slurmd and slurm-client.
"""

import fcntl
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.slurm import machines

NODES = ("node1", "node2")
GPUS = 2  # claimed by each node
ENDED = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}

# Partition "high" preempts "low". Short waits everywhere: SLURM's defaults are made for hours.
CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
# As on a real cluster: a requeued job waits until its old credentials have expired. The default is 120 s.
AuthInfo=cred_expire=5
# The controller on 127.0.0.1 only, but steps on every address: peers answer to the source of a connection.
CommunicationParameters=NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Believe the numbers below, not the machine's.
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
JobRequeue=1
KillWait=15
SlurmdTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=1000,bf_interval=1
PartitionName=low Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=node[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why SLURM cannot be had here, or None; installs it where it can."""
    return machines.unavailable(
        ("slurmctld", "slurmd", "slurm-client"), ("slurmctld", "slurmd", "sbatch")
    )


class Cluster:
    """Two nodes, node1 and node2, with 16 claimed cores each, and the commands to use them."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = os.open(
            Path(tempfile.gettempdir()) / "slurm-test.lock", os.O_CREAT | os.O_RDWR
        )

    def __enter__(self) -> "Cluster":
        fcntl.flock(
            self._lock, fcntl.LOCK_EX
        )  # addresses and ports are the machine's: one at a time
        for name in ("state", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        lines = [CONFIGURATION.format(folder=self.folder, port=16817)]
        machines.hosts(self.folder, NODES)
        for number, node in enumerate(NODES, 1):
            lines.append(
                f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1{number} Port={16820 + number} "
                f"CPUs=16 RealMemory=64000 Gres=gpu:{GPUS} State=UNKNOWN"
            )
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        devices = self.folder / "gpu"  # SLURM takes nothing but device files for GPUs
        for number in range(GPUS):
            os.mknod(f"{devices}{number}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(
            f"NodeName=node[1-2] Name=gpu File={devices}[0-{GPUS - 1}]\n"
        )
        self._start("localhost", "slurmctld", "-D")
        for node in NODES:
            self.switch_on(node)
        try:
            self.until(lambda: self.nodes() == dict.fromkeys(NODES, "idle"), 30, "nodes ready")
        except BaseException:
            print(self.logs())
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in list(self._daemons):
            self.switch_off(host)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def _start(self, host: str, *daemon: str) -> None:
        binds = {"/etc/hosts": self.folder / "hosts"}
        log = self.folder / f"{host}.log"
        self._daemons[host] = machines.start(host, list(daemon), log, binds, self.environment)

    def switch_on(self, node: str) -> None:
        """Start a node's slurmd."""
        self._start(node, "slurmd", "-D", "-N", node)

    def switch_off(self, node: str) -> None:
        """As if the power failed: slurmd and whatever runs on the node are gone at once."""
        process = self._daemons.pop(node)
        process.kill()
        process.wait()

    def repair(self) -> None:
        """Switch on what a failed test left switched off."""
        for node in NODES:
            if node not in self._daemons:
                self.switch_on(node)

    def command(self, *command: str, check: bool = True, **variables: str) -> str:
        """Run a SLURM client; its output."""
        done = subprocess.run(
            command,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def nodes(self) -> dict[str, str]:
        """State by node."""
        lines = self.command("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T", check=False)
        return dict(line.split() for line in lines.splitlines())

    def job(self, job: str) -> dict[str, str]:
        """What the controller knows of a job: JobState, ExitCode, Restarts, Reason, ..."""
        text = self.command("scontrol", "show", "job", "-o", job)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def until(self, condition: Callable[[], Any], seconds: float, what: str) -> Any:
        """Wait for a condition; its value."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := condition():
                return value
            time.sleep(0.2)
        raise AssertionError(f"not within {seconds:.0f} s: {what}")

    def ended(self, job: str, seconds: float) -> dict[str, str]:
        """Wait for a job's end; what the controller knows of it then."""

        def at_rest() -> dict[str, str] | None:
            known = self.job(job)
            return known if known["JobState"] in ENDED else None

        return self.until(at_rest, seconds, f"the end of job {job}")

    def logs(self) -> str:
        """What the daemons said last."""
        parts = []
        for path in sorted(self.folder.glob("*.log")):
            parts.append(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}")
        return "\n".join(parts)
