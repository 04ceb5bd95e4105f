"""A job before it waits in a queue: the doctor in its place under SLURM, and a dry run of it on a login node.

A job script starts $PROGRAM, launcher/pretrain.py unless told otherwise, with the flags that follow it on the command
line. So the doctor sees what the job would: the same nodes, launcher, environment and flags. With DRY_RUN=1 the
script runs launcher/plan.py for its number of ranks where it would start processes.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sltrain_dist.parallel.mesh import launched_world_size
from sltrain_dist.tools.plan_report import run as plan
from sltrain_dist.train.flags import tool_parser
from sltrain_dist.utils.errors import UserError

PROGRAM = "launcher/doctor.py"
_POLL = 1.0  # seconds; sbatch --wait would look every ten
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL",
         "DEADLINE", "REVOKED")  # fmt: skip
_SHORT = {
    "-N": "--nodes",
    "-n": "--ntasks",
    "-J": "--job-name",
    "-c": "--cpus-per-task",
    "-G": "--gpus",
}
# What a dry run of a plan takes beside pretrain's flags; as in launcher/plan.py.
_PLAN: dict[str, dict[str, Any]] = {
    "--dry_run": {"nargs": "?", "type": int, "const": 0},
    "--device": {"choices": ("cpu", "cuda"), "default": "cuda"},
    "--gpu_memory": {},
    "--tflops": {"type": float},
    "--bandwidth": {"type": float},
    "--json": {},
}
_DOCTOR = ("skip", "meet_timeout", "trial_timeout")  # which a plan has no use for


@dataclass(frozen=True)
class Job:
    """What a job script asks for in its #SBATCH lines. gpus: of a node, 0: none asked for."""

    name: str
    nodes: int
    tasks: int
    gpus: int
    cpus: int


def run(own: dict[str, Any], arguments: Sequence[str]) -> int:
    """Do what --slurm and --dry_run ask for; returns the exit code.

    Args:
        own: launcher/doctor.py's flags. arguments: the whole command line.

    Raises:
        UserError: no script, no SLURM, or what pretrain and the planner refuse.
    """
    parser = tool_parser("doctor.py", None, {"--slurm": {}})
    _, rest = parser.parse_known_args(list(arguments))
    if own["slurm"] is None:
        return dry_run(rest)
    try:
        *given, script = shlex.split(own["slurm"]) or [""]
    except ValueError as error:
        raise UserError(f"--slurm {own['slurm']}: {error}; mend the quotes") from None
    if not Path(script).is_file():
        raise UserError(
            f"--slurm {own['slurm']}: no file {script!r}; give a job script, as those in slurm/, behind sbatch's flags"
            " if it takes any, in quotes"
        )
    if own["dry_run"] is None:
        return _submit(given, Path(script), rest)
    if own["dry_run"]:
        raise UserError(
            f"--dry_run {own['dry_run']}: the script says how many ranks; leave the number out"
        )
    parser = tool_parser("doctor.py", None, {"--dry_run": {"nargs": "?"}})
    return _dry_job(read_job(Path(script), given), Path(script), parser.parse_known_args(rest)[1])


def dry_run(arguments: Sequence[str]) -> int:
    """The run on imagined ranks: every flag resolved as the run would, bytes, time, and whether it fits.

    Args:
        arguments: pretrain's flags, with --dry_run [RANKS] and launcher/plan.py's among them. Without a number
            of ranks it is that of this launch.

    Raises:
        UserError: what pretrain or the planner refuses; a plan above --gpu_memory.
    """
    table = _PLAN | {f"--{name}": {} for name in _DOCTOR}
    given, rest = tool_parser("pretrain.py", None, table).parse_known_args(list(arguments))
    own = vars(given) | {"fit": False, "png": None}
    ranks = own.pop("dry_run")
    if ranks < 0:
        raise UserError(f"--dry_run {ranks}: give a number of ranks, at least 1")
    plan(own | {"gpus": ranks or launched_world_size()}, rest)
    return 0


def _dry_job(job: Job, script: Path, arguments: Sequence[str]) -> int:
    """The script itself, with DRY_RUN=1 and what SLURM would have told it."""
    told = {
        "SLURM_JOB_ID": "0",
        "SLURM_JOB_NAME": job.name,
        "SLURM_JOB_NUM_NODES": job.nodes,
        "SLURM_NNODES": job.nodes,
        "SLURM_JOB_NODELIST": "localhost" if job.nodes == 1 else f"node[1-{job.nodes}]",
        "SLURM_NTASKS_PER_NODE": job.tasks,
        "SLURM_NTASKS": job.tasks * job.nodes,
        "SLURM_CPUS_PER_TASK": job.cpus,
        "SLURM_SUBMIT_DIR": os.getcwd(),
        "DRY_RUN": "1",
    }
    if job.gpus:
        told["SLURM_GPUS_ON_NODE"] = job.gpus
    environment = os.environ | {name: str(value) for name, value in told.items()}
    print(f"{script}: {job.nodes} nodes, {job.gpus or 'no'} GPUs each", flush=True)
    return subprocess.run(
        ["bash", str(script), *arguments], env=environment, check=False
    ).returncode


def read_job(script: Path, given: Sequence[str] = ()) -> Job:
    """What a job gets, by the #SBATCH lines of its script; as sbatch does, only those before its first command.

    Args:
        given: sbatch's flags, which win over those lines.

    Raises:
        UserError: a number that is none.
    """
    found: dict[str, str] = {}
    for line in script.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("#SBATCH"):
            found |= _options(shlex.split(line.removeprefix("#SBATCH"), comments=True))
        elif line.strip() and not line.startswith("#"):
            break
    found |= _options(given)

    def number(name: str, default: int) -> int:
        text = found.get(name, str(default))
        digits = re.match(r"\d+", text)  # of nodes "2-4" SLURM may give two
        if digits is None:
            raise UserError(f"--slurm {script}: {name}={text}; give a number")
        return int(digits[0])

    per_node = found.get("--gpus-per-node") or found.get("--gres", "")
    gpus = (
        re.search(r"(?:^|:)(\d+)$", per_node.split(",")[0])
        if "gpu" in per_node or per_node
        else None
    )
    name = found.get("--job-name", script.name)
    tasks = number("--ntasks-per-node", 1)
    return Job(
        name, number("--nodes", 1), tasks, int(gpus[1]) if gpus else 0, number("--cpus-per-task", 1)
    )


def _options(words: Sequence[str]) -> dict[str, str]:
    """ "--nodes=2 -J x" as a dictionary of long names."""
    found, name = {}, None
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            found[name] = value
        elif word.startswith("-") and word[:2] in _SHORT:
            name = _SHORT[word[:2]]
            found[name] = word[2:].removeprefix("=")
        elif name is not None and not found[name]:
            found[name] = word
    return found


def _submit(given: Sequence[str], script: Path, arguments: Sequence[str]) -> int:
    """Submit, show what the job says as it says it, hand on its exit status."""
    for tool in ("sbatch", "scontrol"):
        if shutil.which(tool) is None:
            raise UserError(
                f"--slurm {script}: {tool} is not on the PATH; log in to a node where jobs are submitted, or run "
                "the doctor under torchrun"
            )
    flags, exported = [], "ALL"
    for flag in given:  # of two --export the last would win, and train instead
        if flag.startswith("--export="):
            exported = flag.removeprefix("--export=")
        else:
            flags.append(flag)
    export = f"--export={exported},PROGRAM={PROGRAM}"
    command = ["sbatch", *flags, "--parsable", export, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise UserError(
            f"--slurm {script}: sbatch refused it ({lines[-1]}); change the script's #SBATCH lines, or put sbatch's"
            f' flags before it: --slurm "--nodes=1 {script}"'
        )
    job = done.stdout.strip().split(";")[0]
    print(f"job {job} submitted; its output follows when it runs", flush=True)
    try:
        return _follow(job)
    except KeyboardInterrupt:
        subprocess.run(["scancel", job], check=False)
        print(f"\njob {job} cancelled", file=sys.stderr)
        return 130


def _follow(job: str) -> int:
    """Print the job's output until it has ended."""
    state: dict[str, str] = {}
    shown, before = 0, ""
    while True:
        now = _state(job)
        ended = not now or now["JobState"] in _OVER
        state = now or state
        if state and state["JobState"] != before and not ended:
            before = state["JobState"]
            reason = state.get("Reason", "None")
            note = f" ({reason})" if reason not in ("None", "") else ""
            print(f"job {job}: {before.lower()}{note}", flush=True)
        shown = _show(state.get("StdOut", ""), shown)
        if ended:
            break
        time.sleep(_POLL)
    if not state:
        raise UserError(f"job {job}: SLURM does not know it; see squeue and scontrol show job")
    code, _, number = state.get("ExitCode", "0:0").partition(":")
    result = int(code) or (128 + int(number) if int(number or 0) else 0)
    if result == 0 and state["JobState"] not in ("COMPLETED",):
        result = 1
    print(f"job {job}: {state['JobState'].lower()}, exit code {result}", flush=True)
    return result


def _state(job: str) -> dict[str, str]:
    """Fields of `scontrol show job`; empty when SLURM has forgotten it."""
    done = subprocess.run(
        ["scontrol", "show", "job", job], capture_output=True, text=True, check=False
    )
    fields = dict(word.partition("=")[::2] for word in done.stdout.split() if "=" in word)
    return fields if "JobState" in fields else {}


def _show(path: str, shown: int) -> int:
    """Print what a file has gained; returns the bytes shown so far."""
    with contextlib.suppress(OSError):  # not there before the job starts
        with open(path, "rb") as file:
            file.seek(shown)
            text = file.read()
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()
        shown += len(text)
    return shown
