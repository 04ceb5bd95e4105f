"""The doctor's checks of what the run needs: memory, disk, text, its support, and the checkpoint it continues from."""

import json
import math
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sltrain_dist.data import open_data, prepare_data
from sltrain_dist.parallel.engine import check_support
from sltrain_dist.parallel.mesh import launched_local_rank
from sltrain_dist.params import collect_specs
from sltrain_dist.tools.doctor_visit import Outcome, Visit, failed, passed, refusal, skipped
from sltrain_dist.tools.plan import Request, plan
from sltrain_dist.train.checkpoint_find import find
from sltrain_dist.train.checkpoint_folder import STATE, entries
from sltrain_dist.train.checkpoint_identity import check_configuration
from sltrain_dist.train.checkpoint_room import available_memory
from sltrain_dist.train.memory import checkpoint_bytes
from sltrain_dist.train.run_folder import claim_folder
from sltrain_dist.train.summary import human_bytes
from sltrain_dist.utils.errors import UserError

_SLOWEST_FOLDER = 10.0  # seconds until a file written on one node must be seen on another
_WRITTEN = 32 << 20  # bytes that a rank writes to measure the disk
_HEADERS = 1.02  # of a checkpoint's tensors: paddings, headers and JSON


def memory(visit: Visit) -> Outcome:
    """The plan of a rank against its device, or its share of the host. One rank plans for all: the plans are one."""
    meeting, given = visit.meeting, visit.options.gpu_memory
    limits = [limit for limit in meeting.gather(_own_memory(visit)) if limit is not None]
    visit.limit = limit = given if given is not None else min(limits, default=None)
    answer: dict[str, Any] = {}
    if meeting.rank == 0:
        request = Request(visit.arguments, meeting.world_size, visit.device, limit, 1.0, 1.0)
        try:
            found = plan(request)
            largest = max(found.measured.peak.items(), key=lambda item: item[1])
            answer = {"total": found.total, "largest": largest}
        except UserError as error:  # what pretrain takes, and the planner does not
            answer = {"unknown": str(error)}
    answer = meeting.gather(answer)[0]
    if "unknown" in answer:
        return skipped(answer["unknown"])
    total, (kind, size) = answer["total"], answer["largest"]
    text = f"a rank takes {human_bytes(total)} (most of it {kind}, {human_bytes(size)})"
    if limit is None:
        return skipped(f"{text}; psutil, which knows what the host has, is not installed")
    whose = "its GPU" if visit.device == "cuda" else "its share of the host"
    has = (
        f"--gpu_memory {human_bytes(limit)}"
        if given is not None
        else f"{whose} has {human_bytes(limit)}"
    )
    if total > limit:
        return failed(
            f"{text}, {has}",
            "lower --batch_size, add --activation_checkpointing, more ranks or --tensor_parallel; launcher/plan.py --fit "
            "searches settings that fit",
        )
    return passed(f"{text}, {has}")


def _own_memory(visit: Visit) -> int | None:
    """Bytes free for this rank: of its GPU, or of the host, shared with the ranks beside it."""
    if visit.device == "cuda":
        return int(torch.cuda.mem_get_info(launched_local_rank())[0])
    free, hosts = available_memory(), visit.meeting.hosts
    return None if free is None else free // hosts.count(hosts[visit.meeting.rank])


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    place = folder.absolute()
    return next(path for path in (place, *place.parents) if path.exists())


def save_dir(visit: Visit) -> Outcome:
    """Every rank can write there, and all see one folder. Leaves a temporary folder there in the visit."""
    meeting, target = visit.meeting, visit.save_dir
    token: Any = None
    if meeting.rank == 0:
        with _blamed(target):
            token = _begin(visit, target)
    token = meeting.gather(token)[0]
    folder = Path(token["folder"])
    visit.folder = folder
    marker = folder / "seen"
    seen = _appears(marker) and marker.read_text() == token["secret"]
    blind = [rank for rank, sees in enumerate(meeting.gather(seen)) if not sees]
    if blind:
        return failed(
            f"--save_dir {target}: {meeting.place(blind[0])} does not see what rank 0 wrote there",
            "give a folder that all nodes share, mounted under one path",
        )
    with _blamed(target):
        (folder / f"rank-{meeting.rank}").write_text("")
    meeting.gather(None)
    names = [f"rank-{rank}" for rank in range(meeting.world_size)]
    hidden = [name for name in names if not _appears(folder / name)]
    if hidden:
        return failed(
            f"--save_dir {target}: what {hidden[0]} wrote there is not seen by rank {meeting.rank}",
            "give a folder that all nodes share",
        )
    return passed(f"{target}: written and seen by all ranks")


def _begin(visit: Visit, target: Path) -> dict[str, str]:
    place = existing(target)
    if not place.is_dir():
        raise UserError(f"--save_dir {target}: {place} is a file; give another folder")
    visit.folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=place))
    if target.is_dir():
        claim_folder(target, visit.config)  # refuses another run's
    secret = secrets.token_hex(8)
    (visit.folder / "seen").write_text(secret)
    return {"folder": str(visit.folder), "secret": secret}


@contextmanager
def _blamed(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--save_dir {target}: not writable ({error.strerror}); have it mounted read-write and give this user "
            "the right to write, or give another folder"
        ) from None


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _SLOWEST_FOLDER
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def disk(visit: Visit) -> Outcome:
    """Room for the checkpoints that will be kept, and the time of writing one."""
    config, meeting, folder = visit.config, visit.meeting, visit.folder
    assert folder is not None
    size = int(checkpoint_bytes(config, visit.parameters) * _HEADERS)
    saves = math.ceil(
        config.optimizer.total_steps / (config.save_every or config.optimizer.total_steps)
    )
    there = len(entries(visit.save_dir)) if visit.save_dir.is_dir() else 0
    # While one more is written, those that are kept are all there.
    count = min(config.keep_last + 1 if config.keep_last else saves, saves)
    needed = size * max(1, count - there)
    # Asked by one: the others might be writing already.
    free = meeting.gather(shutil.disk_usage(folder).free if meeting.rank == 0 else 0)[0]
    text = f"{human_bytes(free)} free; {max(1, count - there)} checkpoints of {human_bytes(size)}"
    if needed > free:
        return failed(
            f"--save_dir {visit.save_dir}: {text} do not fit",
            "make room, give a --save_dir on a larger disk, or lower --keep_last",
        )
    amount = max(1 << 20, min(_WRITTEN, (free - needed) // (2 * meeting.world_size)))
    began = time.perf_counter()
    _write(folder / f"speed-{meeting.rank}", amount)
    seconds = max(meeting.gather(time.perf_counter() - began))
    rate = amount * meeting.world_size / seconds
    text += f"; all ranks write {rate / 1e6:,.0f} MB/s with fsync, a checkpoint takes {size / rate:,.0f} s"
    if size / rate > config.timeout:
        return failed(
            f"--save_dir {visit.save_dir}: {text}, longer than --timeout {config.timeout:g}",
            "give a faster --save_dir, or raise --timeout",
        )
    return passed(text)


def _write(path: Path, amount: int) -> None:
    """Write and sync bytes that no file system can compress."""
    piece = os.urandom(1 << 20)
    try:
        with path.open("wb") as file:
            for _ in range(max(1, amount // len(piece))):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"--save_dir {path.parent.parent}: {error.strerror}; make room, or give another folder"
        ) from None
    finally:
        path.unlink(missing_ok=True)


def data(visit: Visit) -> Outcome:
    """Tokenizer, corpus and index, as training will open them: prepared here where they are not, so the run need not."""
    config, meeting = visit.config, visit.meeting
    problem = None
    if launched_local_rank() == 0:
        try:
            prepare_data(config.data, config.model.vocab_size)
        except UserError as error:
            problem = str(error)
    problems = [found for found in meeting.gather(problem) if found]
    if problems:
        return refusal(problems[0])
    engine = config.engine
    opened = open_data(
        config.data,
        config.model.vocab_size,
        global_batch=config.total_batch_size,
        micro_batch=engine.batch_size,
        gradient_accumulation=engine.gradient_accumulation,
        dp_rank=meeting.rank // engine.tensor_parallel,
        dp_size=meeting.world_size // engine.tensor_parallel,
        prepare=False,
    )
    next(iter(opened.updates(0)))
    found = meeting.gather([opened.state(0)["order"], opened.tokenizer.fingerprint])
    if (rank := visit.first_other(found)) is not None:
        return failed(
            f"--corpus {config.data.corpus}: {meeting.place(rank)} has other text or another tokenizer than rank 0",
            "give files, a --cache_dir or (for stdlib) a Python that all nodes share",
        )
    return passed(opened.description)


def support(visit: Visit) -> Outcome:
    """Every rank makes the same sparse support; raises UserError, as training would, where not."""
    assert visit.mesh is not None
    seed, method = visit.config.method.seed, visit.config.method
    if method.method not in ("sltrain", "slope"):
        return skipped(f"--method {method.method} has none")
    check_support(visit.mesh, collect_specs(visit.blank), seed)
    what = f"{method.support}, density {method.density:g}"
    if method.method == "slope":
        what = f"{method.pattern} pruned"
    return passed(f"{what}, seed {seed}: the same hash on all ranks")


def checkpoint(visit: Visit) -> Outcome:
    """What --continue_from means is whole, byte by byte, and of this model and method."""
    source = visit.config.continue_from
    if source is None:
        return skipped("no --continue_from: a fresh start")
    assert visit.mesh is not None
    if source == "auto" and not visit.config.save_dir:
        raise UserError("--continue_from auto: looks in --save_dir, which is not given; add it")
    found = find(source, visit.save_dir, visit.mesh)
    if found.warnings:
        return failed(
            found.warnings[0],
            "move the damaged folder away; the run would pass over it as said here",
        )
    if found.folder is None:
        return passed(f"{visit.save_dir} has none yet: a fresh start")
    document = json.loads((found.folder / STATE).read_text(encoding="utf-8"))
    check_configuration(document, visit.config, found.folder)
    return passed(f"{found.folder}: whole")
