"""The doctor: looks at a launch before hours are spent on it, and says what to mend.

It runs under the launcher of the run, with its flags, on its ranks. A table of checks, each row a name and a function;
the last is a live trial of the run itself (doctor_trial). What depends on something that failed is skipped.
"""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sltrain_dist.config import TrainConfig
from sltrain_dist.model.backends import resolve_attention, resolve_norm
from sltrain_dist.parallel import mesh as meshes
from sltrain_dist.parallel.reach import LeftError, ReachError, meet
from sltrain_dist.tools import doctor_machine as machine
from sltrain_dist.tools import doctor_run as planned
from sltrain_dist.tools.doctor_trial import trial
from sltrain_dist.tools.doctor_visit import (
    Check,
    Options,
    Outcome,
    Result,
    Visit,
    failed,
    merge,
    refusal,
    skipped,
)
from sltrain_dist.tools.plan import blank_model, parse_bytes
from sltrain_dist.tools.plan_output import check_target, write_json
from sltrain_dist.train.settings import resolve
from sltrain_dist.train.tracker import check_tracker
from sltrain_dist.utils.errors import UserError

_HOURS = 24 * 3600.0

# In this order: memory imagines ranks, so it comes before links, which joins the real ones.
CHECKS = (
    Check("meet", machine.meet, ()),
    Check("versions", machine.versions),
    Check("settings", machine.settings),
    Check("devices", machine.devices),
    Check("clock", machine.clock, seconds=600.0),
    Check("kernels", machine.kernels_loaded),
    Check("memory", planned.memory, ("meet", "devices", "kernels"), seconds=1800.0),
    Check("save_dir", planned.save_dir),
    Check("disk", planned.disk, ("meet", "save_dir"), seconds=600.0),
    Check("data", planned.data, seconds=_HOURS),
    Check("links", machine.links, ("meet", "devices"), seconds=1800.0),
    Check("support", planned.support, ("meet", "kernels", "links")),
    Check("checkpoint", planned.checkpoint, ("meet", "links", "save_dir"), seconds=_HOURS),
)
# Training is tried where everything else stands.
TRIAL = Check("trial", trial, tuple(check.name for check in CHECKS), seconds=_HOURS)
NAMES = (*(check.name for check in CHECKS), TRIAL.name)


def run(own: dict[str, Any], arguments: Sequence[str], pretrain: Path) -> int:
    """Examine this launch; returns the exit code, 0 or 2, the same on every rank.

    Args:
        own: launcher/doctor.py's flags. arguments: pretrain's. pretrain: launcher/pretrain.py.

    Raises:
        UserError: a flag that is wrong; what pretrain refuses before anything is built.
    """
    options = _options(own, pretrain)
    left_out = _left_out(own["skip"])
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        return (
            2  # torchrun --max_restarts starts again whoever fails; the verdict would be the same
        )
    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        check_target(own["json"], "--json")
    config = resolve(arguments, meshes.launched_world_size())
    _refuse(config)
    try:
        meeting = meet(options.meet_timeout)
    except ReachError as error:
        return _nobody(error, own, first)
    visit = Visit(tuple(arguments), config, options, meeting)
    results: list[Result] = []
    try:
        for check in (*CHECKS, TRIAL):
            results.append(_examine(check, visit, results, left_out))
            if first:
                print(_row(results[-1]), flush=True)
    finally:
        _tidy(visit)
    if first:
        _end(results, own["json"], arguments, meeting.hosts)
    meeting.close()
    return _code(results)


def _options(own: dict[str, Any], pretrain: Path) -> Options:
    for flag in ("meet_timeout", "trial_timeout"):
        if not 0 < own[flag] < _HOURS:
            raise UserError(f"--{flag} {own[flag]:g}: must lie between 0 and {_HOURS:g} seconds")
    memory = None if own["gpu_memory"] is None else parse_bytes(own["gpu_memory"])
    return Options(own["meet_timeout"], own["trial_timeout"], memory, pretrain)


def _refuse(config: TrainConfig) -> None:
    """Raise UserError for what pretrain refuses when it builds, in its words: one line, before any rank is waited for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, model = getattr(torch, config.engine.dtype), config.model
    check_tracker(config.tracker)
    resolve_attention(config.attention, device, dtype, model.head_dim)
    resolve_norm(config.norm, device, dtype, model.hidden_size)
    blank_model(config)


def _left_out(text: str | None) -> set[str]:
    names = set(text.split(",")) if text else set()
    if unknown := sorted(names - set(NAMES) | names & {"meet"}):
        known = ", ".join(NAMES[1:])
        raise UserError(f"--skip {unknown[0]}: no check that can be left out; they are {known}")
    return names


def _examine(check: Check, visit: Visit, before: list[Result], left_out: set[str]) -> Result:
    """One check on all ranks: its verdict is the same on each."""
    began = time.perf_counter()
    if check.name in left_out:
        return Result(check.name, skipped("left out by --skip"), 0.0)
    # A check that was skipped for a reason of its own (no GPU, one rank) stands in nobody's way.
    missing = [r.name for r in before if r.name in check.needs and not _stands(r, left_out)]
    if missing:
        return Result(check.name, skipped(f"needs {missing[0]}"), 0.0)
    meeting = visit.meeting
    meeting.begin(check.name, check.seconds)
    own = _attempt(check, visit)
    meeting.leave()
    meeting.begin(f"{check.name}-outcome", check.seconds)
    plain = None if own is None else [own.status, own.found, own.mend]
    try:
        everyone = [None if one is None else Outcome(*one) for one in meeting.gather(plain)]
    except ReachError as error:
        everyone = [failed(error.found, error.mend)]
    return Result(check.name, merge(everyone, meeting), time.perf_counter() - began)


def _stands(result: Result, left_out: set[str]) -> bool:
    outcome = result.outcome
    if result.name in left_out:
        return result.name not in ("links", "save_dir")  # which leave something that others use
    return outcome.status == "passed" or (
        outcome.status == "skipped" and not outcome.found.startswith("needs ")
    )


def _attempt(check: Check, visit: Visit) -> Outcome | None:
    """This rank's outcome; None where a peer has left the check for a failure of its own."""
    try:
        return check.run(visit)
    except UserError as error:
        return refusal(str(error))
    except ReachError as error:
        return failed(error.found, error.mend)
    except LeftError:
        return None
    except Exception as error:  # a fault of ours, or of a library: the other checks go on
        text = (str(error).strip().splitlines() or [""])[0][:300]
        return failed(
            f"{type(error).__name__}: {text}", "report this with the command that was given"
        )


def _row(result: Result) -> str:
    outcome = result.outcome
    lines = [f"{outcome.status:<8} {result.name:<11} {outcome.found}"]
    if outcome.mend:
        lines.append(f"{'':<8} {'mend':<11} {outcome.mend}")
    return "\n".join(lines)


def _nobody(error: ReachError, own: dict[str, Any], first: bool) -> int:
    """The ranks did not meet: the first one says it, and each that has nobody to say it for it."""
    results = [Result("meet", failed(error.found, error.mend), 0.0)]
    results += [Result(name, skipped("needs meet"), 0.0) for name in NAMES[1:]]
    if first:
        print("\n".join(map(_row, results)), flush=True)
        _end(results, own["json"], (), [])
    elif error.alone:
        print(f"rank {os.environ['RANK']}: {_row(results[0])}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # launchers kill all ranks when one ends: let the first one speak
    sys.stdout.flush()
    if error.alone:
        os._exit(2)  # a call into the store may still hang, and would abort an orderly end
    return 2


def _code(results: list[Result]) -> int:
    return 2 if any(result.outcome.status == "failed" for result in results) else 0


def _end(
    results: list[Result], json_file: str | None, arguments: Sequence[str], hosts: list[str]
) -> None:
    names = {
        status: [r.name for r in results if r.outcome.status == status]
        for status in ("passed", "failed", "skipped")
    }
    bad = f" ({', '.join(names['failed'])})" if names["failed"] else ""
    print(
        f"{len(names['passed'])} passed, {len(names['failed'])} failed{bad}, {len(names['skipped'])} skipped",
        flush=True,
    )
    if json_file:
        document = {
            "passed": not names["failed"],
            "checks": [result.to_json() for result in results],
            "hosts": hosts,
            "command": list(arguments),
            "time": time.time(),
        }
        write_json(json_file, document)


def _tidy(visit: Visit) -> None:
    with contextlib.suppress(RuntimeError):
        meshes.close()
    if visit.folder is not None and visit.meeting.rank == 0:
        shutil.rmtree(visit.folder, ignore_errors=True)
