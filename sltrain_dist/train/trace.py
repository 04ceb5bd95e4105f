"""--profile 10:12: torch's profiler over these updates, a trace for chrome://tracing or Perfetto a rank, and memory.

save_dir/profile/ gets, of every rank, ``rank-00000-updates-10-12.json.gz`` (the trace), ``.txt`` (operators by time and by
memory) and, on a GPU, ``.pickle``: the allocator's snapshot, for pytorch.org/memory_viz.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch

_ROWS = 40  # operators in the text
_RECORDS = 100_000  # allocations that the snapshot remembers


class Trace:
    """Records the updates that were asked for, or those of them that came before the run ended; as a context."""

    def __init__(self, updates: tuple[int, int] | None, folder: Path, rank: int) -> None:
        self._updates = updates
        self._path = folder / "profile" / f"rank-{rank:05d}"
        self._profile: Any = None
        self._last = 0
        self._gpu = torch.cuda.is_available()

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """The process must not end while the profiler runs: it would crash."""
        if kind is None:
            self.close()
        elif self._profile is not None:
            with contextlib.suppress(Exception):  # what went wrong is on its way
                self._profile.stop()

    def close(self) -> None:
        """Write what was recorded of updates that the end of the run has cut short."""
        if self._profile is not None:
            self._write()

    def begin(self, update: int) -> bool:
        """Before an update (counted from 1); whether it is traced."""
        if self._updates is not None and self._profile is None and update == self._updates[0]:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._gpu:
                activities.append(torch.profiler.ProfilerActivity.CUDA)
                torch.cuda.memory._record_memory_history(max_entries=_RECORDS)
            self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
            self._profile.start()
        return self._profile is not None

    def end(self, update: int) -> None:
        """After an update; the last one asked for is followed by the files."""
        if self._profile is None or self._updates is None:
            return
        self._last = update
        if not self._updates[0] <= update < self._updates[1]:  # one before them: the run went back
            self._write()

    def _write(self) -> None:
        assert self._updates is not None
        profile, self._profile = self._profile, None
        name = f"{self._path.name}-updates-{self._updates[0]}-{self._last}"
        try:
            profile.stop()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(self._path.with_name(f"{name}.json.gz")))
            averages = profile.key_averages()
            kind = "device" if self._gpu else "cpu"
            tables = [
                averages.table(sort_by=f"self_{kind}_{what}", row_limit=_ROWS)
                for what in ("time_total", "memory_usage")
            ]
            self._path.with_name(f"{name}.txt").write_text("\n".join(tables))
            if self._gpu:
                torch.cuda.memory._dump_snapshot(str(self._path.with_name(f"{name}.pickle")))
        except Exception as error:  # of the disk, or of a library: no reason to stop
            print(f"warning: --profile: {error}; training goes on", file=sys.stderr)
        if self._gpu:
            torch.cuda.memory._record_memory_history(enabled=None)
