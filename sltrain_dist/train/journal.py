"""What a run tells those who watch it from outside: events, a heartbeat, a Prometheus text file.

    events.jsonl    a line for every start, fault, save and end; only ever appended to, whatever is resumed
    heartbeat.json  where the run stands: replaced at every change of state, else at most once a second
    --prometheus    the heartbeat's numbers, for a node exporter

Written by the first rank, replaced atomically, and never a reason to stop: what cannot be written is said once,
and where a write took long the next one waits so much longer that the run does not feel it.
"""

import contextlib
import errno
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sltrain_dist.utils.errors import UserError
from sltrain_dist.utils.interrupt import InterruptError

EVENTS, HEARTBEAT = "events.jsonl", "heartbeat.json"
_INTERVAL = 1.0  # seconds between heartbeats
_KEPT = 10_000  # lines at most that wait for room on the disk
_PATIENCE = 50.0  # a write that took t seconds is followed by as many times t without one


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events of a run folder, oldest first; lines that a crash has torn are left out."""
    try:
        lines = (folder / EVENTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("time"), int | float):
            events.append(event)
    return events


class Tolerant:
    """Writes that never end a run: on ranks other than the first nothing is done, and a file that fails is said once.

    Lines that the disk refused are kept, the last 10,000 of a file, and written before the next one.
    """

    def __init__(self, folder: Path, active: bool) -> None:
        self.folder, self._active = folder, active
        self._failing: set[str] = set()  # files that the disk refuses just now
        self._waiting: dict[str, list[str]] = {}  # lines of a file that the disk refused

    def _try(self, name: str, write: Callable[[], object]) -> None:
        if not self._active:
            return
        try:
            write()
            self._failing.discard(name)
        except OSError as error:
            if name not in self._failing:
                with contextlib.suppress(OSError):  # nobody reads any more
                    text = f"warning: {self.folder / name}: {error.strerror}; training goes on"
                    print(text, file=sys.stderr)
            self._failing.add(name)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        """Add a line of JSON; numbers that JSON has no name for become null."""
        if not self._active:
            return
        lines = self._waiting.setdefault(name, [])
        lines.append(json.dumps(finite(line)) + "\n")
        del lines[:-_KEPT]
        self._flush()

    def _flush(self) -> None:
        """Write the lines that wait."""
        for name in [name for name, lines in self._waiting.items() if lines]:
            self._try(name, partial(self._write_waiting, name))

    def _write_waiting(self, name: str) -> None:
        lines = self._waiting[name]
        while lines:  # one by one: of several that are refused nobody knows which are there
            _add(self.folder / name, lines[0])
            del lines[0]


class Journal(Tolerant):
    """Writes events and heartbeats."""

    def __init__(self, folder: Path, active: bool, prometheus: str | None = None) -> None:
        super().__init__(folder, active)
        self._prometheus = Path(prometheus) if prometheus else None
        self._next = 0.0  # time.monotonic() before which no heartbeat is due
        self._alarms: dict[str, str] = {}
        earlier = read_events(folder) if active else []
        starts = [event for event in earlier if event.get("event") == "start"]
        self.born = float(earlier[0]["time"]) if earlier else time.time()
        self._values: dict[str, Any] = {
            "state": "starting", "step": 0, "total_steps": 0, "tokens_seen": 0, "loss": None,
            "tokens_per_second": None, "eta_seconds": None, "last_checkpoint": None, "goodput": None,
            "restarts": len(starts), "host": socket.gethostname(), "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
        }  # fmt: skip

    @property
    def restarts(self) -> int:
        """Starts of this run before this one."""
        return int(self._values["restarts"])

    def goodput(self, trained: float) -> float:
        """Share of the time since the run's first start that went into updates that count (``trained`` seconds)."""
        return min(1.0, trained / max(time.time() - self.born, 1e-9))

    def event(self, event: str, step: int, **fields: Any) -> None:
        """Append an event."""
        self._append(
            EVENTS, {"time": round(time.time(), 3), "event": event, "step": step, **fields}
        )

    def alarm(self, kind: str, text: str | None) -> None:
        """Raise an alarm that stays in the heartbeat, or take it back (None)."""
        if text is None:
            self._alarms.pop(kind, None)
        else:
            self._alarms[kind] = text

    @contextlib.contextmanager
    def telling(self, step: Callable[[], int]) -> Iterator[None]:
        """Around building and training: tell how it ended where that was not well. ``step``: asked for updates done."""
        try:
            yield
        except InterruptError as error:
            if (
                self._values["state"] != "interrupted"
            ):  # while data was prepared: there was nothing to save
                self.event("interrupted", step(), signal=str(error).partition(" ")[0])
                self.beat("interrupted")
            raise
        except BaseException as error:
            reason = " ".join(str(error).split())[:500] or type(error).__name__
            self.event("failed", step(), reason=reason)
            self.alarm("failed", reason)
            self.beat("failed")
            raise

    def beat(self, state: str | None = None, **values: Any) -> None:
        """Update what the heartbeat says, and write it where ``state`` changes or the last one is old."""
        changed = state is not None and state != self._values["state"]
        self._values |= values | ({"state": state} if state is not None else {})
        if not self._active or (not changed and time.monotonic() < self._next):
            return
        began = time.monotonic()
        document = {"time": round(time.time(), 3), **self._values}
        document["alarms"] = list(self._alarms.values())
        text = json.dumps(finite(document)) + "\n"
        self._try(HEARTBEAT, lambda: _replace(self.folder / HEARTBEAT, text))
        target = self._prometheus
        if target is not None:
            self._try(
                str(target), lambda: _replace(target, prometheus_text(document, self.folder.name))
            )
        ended = time.monotonic()
        self._next = ended + max(_INTERVAL, _PATIENCE * (ended - began))


def prometheus_text(document: dict[str, Any], run: str) -> str:
    """The numbers of a heartbeat in Prometheus' text format."""
    label = run.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
    rows = {
        "time": "unix seconds of this heartbeat",
        "step": "updates done",
        "total_steps": "updates planned",
        "tokens_seen": "tokens trained on",
        "loss": "nats per token, last update",
        "tokens_per_second": "over all ranks, last update",
        "eta_seconds": "until the last update",
        "last_checkpoint": "update of the newest checkpoint",
        "goodput": "share of wall time in updates that count",
        "restarts": "starts before this one",
    }
    lines = []
    for name, text in rows.items():
        value = document.get(name)
        if value is not None and math.isfinite(value):
            metric = f"sltrain_{name}"
            lines += [f"# HELP {metric} {text}", f"# TYPE {metric} gauge"]
            lines.append(f'{metric}{{run="{label}"}} {value!r}')
    lines += ["# HELP sltrain_alarms raised now", "# TYPE sltrain_alarms gauge"]
    lines.append(f'sltrain_alarms{{run="{label}"}} {len(document["alarms"])}')
    lines += ["# HELP sltrain_state 1 for the state it is in", "# TYPE sltrain_state gauge"]
    lines.append(f'sltrain_state{{run="{label}",state="{document["state"]}"}} 1')
    return "\n".join(lines) + "\n"


def _add(path: Path, line: str) -> None:
    """Add all of a line or, where the disk refuses, nothing; one that a crash has torn is ended first."""
    size = None
    try:
        with open(path, "a+b", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
            rest = memoryview(("\n" * torn + line).encode())
            while rest:
                rest = rest[file.write(rest) :]
    except OSError:  # of a network file system as late as in close
        if size is not None:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
        raise


def check_prometheus(target: str | None) -> None:
    """Refuse a file that cannot be written; raises UserError."""
    if target is not None and (Path(target).is_dir() or not Path(target).parent.is_dir()):
        raise UserError(f"--prometheus {target}: give a file in a folder that exists")


def _replace(path: Path, text: str) -> None:
    """Readers see the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not path.exists():
            raise
        with open(
            path, "r+b"
        ) as file:  # no room for a second one: over the first, in its own blocks
            file.write(text.encode().ljust(path.stat().st_size))


def finite(value: Any) -> Any:
    """The value, or the values of a dictionary, with NaN and infinities, for which JSON has no name, as None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
