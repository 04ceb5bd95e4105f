"""The doctor's last check: the run itself, for a few updates, on the real ranks.

Every rank of the doctor starts launcher/pretrain.py as its own rank of a launch beside (another port, a temporary
folder on the disk of --save_dir, the run's flags with few changed):

    first      3 updates, a checkpoint, on; killed by SIGKILL in a later update
    resumed    from that checkpoint, on the same layout: the same losses
    resharded  from that checkpoint, on another layout, by another engine, or rewritten by the converter: within 1e-4

A run that trains, saves and comes back here will do so in the night.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sltrain_dist.config import TrainConfig
from sltrain_dist.parallel import mesh as meshes
from sltrain_dist.tools.convert import convert
from sltrain_dist.tools.doctor_visit import Outcome, Visit, failed, passed
from sltrain_dist.tools.plan import Request, settle
from sltrain_dist.train.flags import FLAGS, explicit
from sltrain_dist.train.settings import resolve
from sltrain_dist.utils.errors import UserError

SAVED, SEEN = 3, 5  # the update that is saved, and the one after whose loss a run is killed
_UPDATES = 1000  # of the schedule; no run comes that far
_POLL = 0.05  # seconds
_LOOSE = 2e-2  # nats, where numbers are rounded to 16 or 8 bits
_TIGHT = 1e-4
# Flags that describe the real run's length, place and records: the trial has its own.
_DROPPED = ("save_dir", "continue_from", "max_train_tokens", "num_training_steps", "warmup_steps", "save_every",
            "eval_every", "keep_last", "scheduler", "cycle_length", "tracker", "name", "tags", "profile", "prometheus")  # fmt: skip
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl


@dataclass(frozen=True)
class Layout:
    """Another way to hold the same run: what changes, in words, and in flags (None: left out)."""

    words: str
    changes: Mapping[str, Any]


def trial(visit: Visit) -> Outcome:
    """Train, save, kill, resume, reshard."""
    began = time.perf_counter()
    common = {
        name: value for name, value in explicit(visit.arguments).items() if name not in _DROPPED
    }
    common |= {
        "num_training_steps": _UPDATES,
        "warmup_steps": 1,
        "keep_last": 0,
        "eval_every": 0,
        "tracker": "none",
    }
    folder = visit.folder
    assert folder is not None
    meshes.close()  # the trial's ranks need the GPU's memory more
    if visit.device == "cuda":
        torch.cuda.empty_cache()
    if (problem := _train(visit, "first", common | {"save_every": SAVED})) is not None:
        return problem
    source = folder / "first" / f"step_{SAVED}"
    common |= {"save_every": 0}
    if (problem := _train(visit, "resumed", common | {"continue_from": source})) is not None:
        return problem
    layout = _another(visit, common)
    if not layout.changes:
        source = _rewritten(visit, source)
    changed = {
        name: value for name, value in (common | dict(layout.changes)).items() if value is not None
    }
    if (problem := _train(visit, "resharded", changed | {"continue_from": source})) is not None:
        return problem
    exact = visit.device == "cpu"  # attention's backward on CUDA adds in any order
    tolerance = _tolerance(visit.config)
    same = visit.meeting.gather(compare(folder, "resumed", 0.0 if exact else tolerance))[0]
    near = visit.meeting.gather(compare(folder, "resharded", tolerance))[0]
    for text, what in ((same, "resumed"), (near, f"resharded ({layout.words})")):
        if not text[0]:
            return failed(
                f"{what} from the checkpoint of update {SAVED}, {text[1]}",
                "do not start: a restart would train another run; report this with the command that was given",
            )
    return passed(
        f"{SAVED} updates, saved, killed by SIGKILL; resumed: {same[1]}; resharded ({layout.words}): {near[1]}; "
        f"{time.perf_counter() - began:.0f} s"
    )


def _tolerance(config: TrainConfig) -> float:
    rounded = config.engine.dtype != "float32" or "8bit" in config.optimizer.name
    return _LOOSE if rounded else _TIGHT


def compare(folder: Path, name: str, tolerance: float) -> tuple[bool, str]:
    """Whether the losses after the checkpoint are those of the first run, and the words for it."""
    first, other = losses(folder / "first"), losses(folder / name)
    pairs = [(first.get(step), other.get(step)) for step in range(SAVED + 1, SEEN + 1)]
    if any(mine is None or theirs is None for mine, theirs in pairs):
        return False, "its records lack updates"
    worst = max(abs(mine - theirs) for mine, theirs in pairs)  # type: ignore[operator]
    if worst == 0:
        return True, "losses equal to the bit"
    return worst <= tolerance, f"losses differ by {worst:.1g} nats (allowed {tolerance:g})"


def losses(run: Path) -> dict[int, float]:
    """Training loss by update, of the lines that are whole; empty while there are none."""
    found = {}
    with contextlib.suppress(OSError):
        for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, TypeError, AttributeError):
                line = json.loads(text)
                if line.get("loss") is not None:
                    found[int(line["step"])] = float(line["loss"])
    return found


def _another(visit: Visit, common: dict[str, Any]) -> Layout:
    """The first other layout that pretrain takes and that fits the memory; without changes: the same, of a checkpoint written anew."""
    for layout in _layouts(visit):
        flags = {
            name: value
            for name, value in (common | dict(layout.changes)).items()
            if value is not None
        }
        with contextlib.suppress(UserError):
            if _fits(visit, resolve(command_line(flags), visit.meeting.world_size)):
                return layout
    return Layout("the checkpoint rewritten by the converter", {})


def _fits(visit: Visit, config: TrainConfig) -> bool:
    """Whether a rank has the memory, by the closed formula: more copies of the model take more than the run itself."""
    if visit.limit is None:
        return True
    ranks = visit.meeting.world_size
    request = Request(visit.arguments, ranks, visit.device, visit.limit, 1.0, 1.0)
    return settle(request, config, visit.blank).formula["total"] <= visit.limit


def _layouts(visit: Visit) -> Iterator[Layout]:
    config, engine = visit.config, visit.config.engine
    data = visit.meeting.world_size // engine.tensor_parallel
    if engine.engine == "zero":
        yield Layout("FSDP2", {"engine": "fsdp", "ds_config": None} | _numbers(config))
        return
    if engine.replicate > 1:
        yield Layout("--replicate 1", {"replicate": None, "shard": None})
    for copies in range(2, data + 1):
        if data % copies == 0 and copies != engine.replicate:
            yield Layout(f"--replicate {copies}", {"replicate": copies, "shard": None})


def _numbers(config: TrainConfig) -> dict[str, Any]:
    """What a ds JSON may have fixed, as flags."""
    engine, optimizer = config.engine, config.optimizer
    return {
        "batch_size": engine.batch_size,
        "total_batch_size": config.total_batch_size,
        "gradient_accumulation": engine.gradient_accumulation,
        "grad_clipping": optimizer.grad_clipping,
        "dtype": engine.dtype,
        "master_weights": "fp32" if engine.master_weights else "none",
        "optimizer": optimizer.name,
        "lr": optimizer.lr,
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "betas": ",".join(map(str, optimizer.betas)),
    }


def _rewritten(visit: Visit, source: Path) -> Path:
    output = source.parent.with_name("rewritten")
    if visit.meeting.rank == 0:
        convert(source, output, shards=visit.meeting.world_size + 1)
    visit.meeting.gather(None)
    return output


def command_line(flags: Mapping[str, Any]) -> list[str]:
    """Flags by name as pretrain takes them."""
    switches = {name for name, value in flags.items() if FLAGS[name].kind is None}
    values = {name: value for name, value in flags.items() if name not in switches}
    line = [f"--{name}" for name in sorted(switches) if flags[name]]
    return line + [text for name, value in values.items() for text in (f"--{name}", str(value))]


def _train(visit: Visit, name: str, flags: Mapping[str, Any]) -> Outcome | None:
    """Run pretrain on all ranks until its loss of update SEEN is there, and kill it; None, or what went wrong."""
    folder, meeting = visit.folder, visit.meeting
    assert folder is not None
    port = meeting.gather(meshes.free_port() if meeting.rank == 0 else 0)[0]
    line = command_line({**flags, "save_dir": folder / name})
    log = folder / f"{name}-{meeting.rank}.log"
    command = [sys.executable, str(visit.options.pretrain), *line]
    with log.open("wb") as output, _child(command, _environment(visit, port), output) as child:
        timed_out = _watch(visit, name, child)
        code = child.poll()
    mine = [code, _last_words(log) if code is not None else ""]
    everyone = meeting.gather([*mine, timed_out])
    ended = {rank: words for rank, (code, words, _) in enumerate(everyone) if code is not None}
    if ended:
        rank = next((rank for rank, words in ended.items() if words), min(ended))
        return failed(
            f"the {name} run ended on {meeting.place(rank)} with exit code {everyone[rank][0]}: {ended[rank]}",
            "start the run by hand with --num_training_steps 5 and see what it says",
        )
    if any(late for *_, late in everyone):
        return failed(
            f"the {name} run had not done {SEEN} updates after {visit.options.trial_timeout:g} s",
            "raise --trial_timeout where an update takes that long; else see what its ranks wait for (py-spy dump)",
        )
    return None


def _watch(visit: Visit, name: str, child: "subprocess.Popen[bytes]") -> bool:
    """Wait until any rank says that the run is to end; whether it was for the time."""
    folder, meeting, key = visit.folder, visit.meeting, f"{name}-ends"
    assert folder is not None
    deadline = time.monotonic() + visit.options.trial_timeout
    saved = folder / name / f"step_{SAVED}"
    while not meeting.told(key):
        if child.poll() is not None:
            meeting.tell(key)
            return False
        if time.monotonic() > deadline:
            meeting.tell(key)
            return True
        # Only rank 0 writes records; and what it saves beside training must have got its name.
        done = meeting.rank == 0 and SEEN in losses(folder / name)
        if done and (name != "first" or saved.is_dir()):
            meeting.tell(key)
            return False
        time.sleep(_POLL)
    return False


def _environment(visit: Visit, port: int) -> dict[str, str]:
    """A launch of its own, with the ranks of this one."""
    keep = {
        name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")
    }
    for name in ("TORCH_CPP_LOG_LEVEL", "PROGRAM"):
        keep.pop(name, None)
    rank, size = str(visit.meeting.rank), str(visit.meeting.world_size)
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    keep.setdefault("LOCAL_RANK", rank)
    keep.setdefault("LOCAL_WORLD_SIZE", size)
    return keep | {
        "RANK": rank,
        "WORLD_SIZE": size,
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


@contextlib.contextmanager
def _child(
    command: list[str], environment: dict[str, str], output: Any
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process with all its own children, killed at the end, and when this process dies."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(
        signal.SIGTERM, end
    )  # launchers send it; without a handler nobody would kill the child
    child = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    try:
        yield child
    finally:
        with contextlib.suppress(OSError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        signal.signal(signal.SIGTERM, before)


def _die_with_parent() -> None:
    with contextlib.suppress(AttributeError, OSError):  # Linux alone has it
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, int(signal.SIGKILL))


def _last_words(log: Path) -> str:
    """The line of an error for users, else the last line that says anything."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (told or lines or [""])[-1][:400]
