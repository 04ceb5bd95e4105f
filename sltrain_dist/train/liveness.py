"""Who has stopped: every rank says that it lives and what it does, so that the others can name the one that does not.

A collective that a dead or stopped rank never joins fails on the others after --timeout, with a message about
sockets. Each rank therefore has a thread that writes a counter and the main thread's place into the store of the
process group every few seconds. When a collective has failed, or the main thread has stood in one for longer than
any collective may, the counters tell which rank stands still. Stacks of all threads, and torch's record of the last
collectives, go to save_dir/faults.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType

from sltrain_dist.parallel.mesh import Mesh, group_store
from sltrain_dist.utils import interrupt
from sltrain_dist.utils.errors import FaultError

_SHARE = 20  # of --timeout between two signs of life
_SLOWEST = 2.0  # seconds between them at most
_WORDS = (
    "gloo",
    "nccl",
    "connection",
    "timed out",
    "timeout",
    "tcpstore",
)  # of a collective's errors
_GRACE = 10.0  # seconds
FAULTS = "faults"
_STORE_GONE = "rank 0, or the launcher that keeps the ranks' store, is gone or stands still"


class Liveness:
    """A rank's signs of life, and its view of the others'; as a context around training."""

    def __init__(self, mesh: Mesh, folder: Path, timeout: float) -> None:
        self._mesh, self._folder, self._timeout = mesh, folder, timeout
        self._period = min(_SLOWEST, timeout / _SHARE)
        self._place = ("start", 0)
        self._moved = time.monotonic()
        self._store = group_store() if mesh.world_size > 1 else None
        self._ended = threading.Event()
        self._blamed: list[int] = []
        # Under gloo a collective has its own time limit and its error is told better: this is for what has none.
        # NCCL's watchdog ends the process without a word when that limit is reached: be there before it.
        self._patience = 0.8 * timeout if mesh.device.type == "cuda" else 1.5 * timeout + _GRACE
        self._ancestors = _launchers()
        self._seen: dict[int, tuple[str, float]] = {}  # rank -> its last sign, and when it was new
        self._silent = set(range(mesh.world_size))  # ranks that never gave one, as far as known
        self._asking: threading.Thread | None = None  # the store
        self._turn = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)

    def at(self, phase: str, step: int) -> None:
        """Say where the main thread stands; costs nothing."""
        self._place, self._moved = (phase, step), time.monotonic()

    def __enter__(self) -> "Liveness":
        if self._store is not None:
            self._ask(partial(self._sign, 0))
        if self._store is not None or self._ancestors:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        """After a failure of a collective say which rank was the cause.

        Raises:
            FaultError: in place of an error that another rank caused.
        """
        blamed = None
        if isinstance(error, RuntimeError) and any(w in str(error).lower() for w in _WORDS):
            self._dump(error)
            blamed = self.blame()
        self._ended.set()
        if blamed is not None:
            reason = " ".join(str(error).split())[:160]
            living = set(range(self._mesh.world_size)) - set(self._blamed)
            speaks = self._mesh.rank == min(living)
            if blamed == _STORE_GONE:  # rank 1 may be gone with it: one of every host speaks
                speaks |= self._mesh.local_rank == 0
            raise FaultError(
                f"{blamed}; continue with --continue_from auto ({reason})", speaks
            ) from error

    def blame(self) -> str | None:
        """The ranks that stand still, in words; None where nobody stands out. Takes a few seconds of watching."""
        if self._store is None:
            return None
        found = self._look()
        time.sleep(2.5 * self._period)
        if not found or not self._look():
            self._blamed = [0]  # so that another rank speaks
            return _STORE_GONE
        if self._silent:
            self._blamed = sorted(self._silent)
            return f"rank {self._blamed[0]} never began to train"
        self._blamed = still = self._still(2.0 * self._period)
        if still:
            return self._describe(still)
        places: dict[str, list[int]] = {}
        for rank, (sign, _) in sorted(self._seen.items()):
            places.setdefault(_where(sign), []).append(rank)
        if len(places) < 2:
            return None
        least = min(places, key=lambda where: len(places[where]))
        return f"all ranks live, but rank {places[least][0]} stands in {least}"

    def _still(self, seconds: float) -> list[int]:
        """Ranks whose last sign of life is so old."""
        now = time.monotonic()
        return [rank for rank, (_, since) in sorted(self._seen.items()) if now - since > seconds]

    def _describe(self, ranks: list[int]) -> str:
        """ "rank 3 (node2) gives no sign of life; it stood in forward of update 12" for the first few."""
        texts = []
        for rank in ranks[:4]:
            sign = self._seen[rank][0]
            host = json.loads(sign)["host"]
            texts.append(f"rank {rank} ({host}) gives no sign of life; it stood in {_where(sign)}")
        more = f"; and {len(ranks) - 4} more" if len(ranks) > 4 else ""
        return "; ".join(texts) + more

    def _watch(self) -> None:
        """The thread: signs of life, the launcher's end, and the backstop."""
        count = 0
        while not self._ended.wait(self._period):
            if self._ancestors and self._ancestors != _launchers():
                interrupt.request("SIGTERM")  # nobody is left to send it
            if self._store is None:
                continue
            count += 1
            self._ask(partial(self._sign, count))
            waiting = time.monotonic() - self._moved
            if waiting <= self._timeout / 4:
                continue
            answered = self._look()
            still = self._still(self._timeout / 2) if answered else []
            if waiting <= self._patience:
                continue
            if still:
                self._end(self._describe(still), still)
            elif not answered and self._place[0] == "training":  # a save needs no store
                self._end(_STORE_GONE, still)

    def _sign(self, count: int) -> None:
        phase, step = self._place
        sign = {"count": count, "phase": phase, "step": step, "host": socket.gethostname()}
        assert self._store is not None
        self._store.set(f"alive/{self._mesh.rank}", json.dumps(sign))

    def _look(self) -> bool:
        """Read everybody's signs; False where the store is gone, or stands still with the process that keeps it."""
        return self._ask(self._read)

    def _ask(self, question: Callable[[], None]) -> bool:
        """Ask the store in a thread that nobody waits for longer than a while; whether there was an answer."""
        answers: list[bool] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                question()
                answers.append(True)

        with self._turn:
            if self._asking is not None and self._asking.is_alive():
                return False  # the one before stands in the store still
            self._asking = threading.Thread(target=ask, name="store", daemon=True)
            self._asking.start()
            self._asking.join(_GRACE)
        return bool(answers)

    def _read(self) -> None:
        assert self._store is not None
        # Reading waits for a sign that is not there yet: ask first.
        silent = {n for n in self._silent if not self._store.check([f"alive/{n}"])}
        ranks = [n for n in range(self._mesh.world_size) if n not in silent]
        signs = self._store.multi_get([f"alive/{n}" for n in ranks])
        now, seen = time.monotonic(), dict(self._seen)
        for rank, sign in zip(ranks, signs, strict=True):
            if rank != self._mesh.rank and seen.get(rank, (None,))[0] != sign.decode():
                seen[rank] = (sign.decode(), now)
        self._silent, self._seen = silent, seen

    def _end(self, text: str, still: list[int]) -> None:
        """End this process: its main thread waits for a rank that will not come, where no time limit holds."""
        self._dump()
        living = [rank for rank in range(self._mesh.world_size) if rank not in still]
        if self._mesh.rank == living[0] or self._mesh.local_rank == 0:
            print(
                f"error: {text}; the others end, continue with --continue_from auto",
                file=sys.stderr,
                flush=True,
            )
        else:
            time.sleep(3)
        os._exit(1)

    def _dump(self, error: BaseException | None = None) -> None:
        """Where ``error`` came from, stacks of all threads, and the last collectives where torch has recorded them."""
        folder = self._folder / FAULTS
        try:
            folder.mkdir(exist_ok=True)
            with open(folder / f"rank-{self._mesh.rank:05d}-stacks.txt", "w") as file:
                if error is not None:
                    file.writelines((*traceback.format_exception(error), "\n"))
                    file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            record = _flight_record(self._mesh.device.type)
            if record:
                (folder / f"rank-{self._mesh.rank:05d}-collectives.json").write_bytes(record)
        except OSError:
            pass  # it is being ended for another reason, which is said


def end_soon() -> None:
    """End this process in a while where it does not by itself: groups and stores may wait for who will not come."""
    timer = threading.Timer(2 * _GRACE, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _flight_record(device: str) -> bytes:
    """Torch's flight recorder, as JSON; empty where this torch has none for the back end."""
    from torch._C import _distributed_c10d as c10d

    names = {"cuda": "_dump_nccl_trace_json", "cpu": "_dump_fr_trace_json"}  # NCCL's and gloo's
    dump = getattr(c10d, names[device], None)
    try:
        record: bytes | str = dump() if dump is not None else b""
    except RuntimeError:
        return b""
    return record.encode() if isinstance(record, str) else record


def _where(sign: str) -> str:
    """ "forward of update 12", from a sign of life."""
    document = json.loads(sign)
    return f"{document['phase']} of update {document['step'] + 1}"


def _launchers() -> tuple[int, ...]:
    """Processes that started this rank and without which nobody could end it: launcher, and deepspeed's front.

    Empty where no launcher did: a shell may end before the run that it started.
    """
    if not {"TORCHELASTIC_RUN_ID", "CROSS_SIZE"} & os.environ.keys():
        return ()
    parent = os.getppid()
    if "CROSS_SIZE" not in os.environ:
        return (parent,)
    try:
        stat = Path(f"/proc/{parent}/stat").read_text()
        return (parent, int(stat.rpartition(")")[2].split()[1]))
    except (OSError, IndexError, ValueError):
        return (parent,)
