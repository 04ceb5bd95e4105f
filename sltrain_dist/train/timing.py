"""Where the time of an update goes, and which rank the others wait for.

Phases are measured in every update, by clock reads or, on a GPU, by events that cost no wait. What collectives
take is sampled in one update of many, by torch's profiler: they run beside the computation, inside the engines,
where no clock of ours reaches. In a sampled update all ranks meet in the same collectives, so the rank that
spends the *least* time in them is the one the others waited for.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sltrain_dist.parallel.mesh import Mesh

PHASES = ("data", "forward", "backward", "optimizer")
STRAGGLING = 0.1  # of an update: by so much less than the others a rank must wait to be named
_WIRE = ("gloo:", "nccl:", "ncclDevKernel", "ncclKernel")  # names of collectives in a profile


class Stopwatch:
    """Seconds of one update by phase; `begin` ends the phase before it."""

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def begin(self, phase: str) -> None:
        """What happens from now on is ``phase``."""
        if self._events:
            mark: Any = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self._marks.append((phase, mark))

    def end(self) -> dict[str, float]:
        """Seconds of every phase since the first `begin`, which are then forgotten."""
        self.begin("")
        seconds = dict.fromkeys(PHASES, 0.0)
        marks, self._marks = self._marks, []
        if self._events:
            marks[-1][1].synchronize()
        for (phase, start), (_, stop) in itertools.pairwise(marks):
            taken = start.elapsed_time(stop) / 1e3 if self._events else stop - start
            seconds[phase] = seconds.get(phase, 0.0) + taken
        return seconds


@dataclass
class Wire:
    """What collectives took in a sampled update: seconds on this rank, added up."""

    seconds: float = field(default=0.0)


@contextmanager
def listening(device: torch.device) -> Iterator[Wire]:
    """Measure the collectives of what runs inside; the result is there afterwards.

    On a GPU their kernels' time; under gloo the time of its threads, overlap with computing included.
    """
    wire = Wire()
    if device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            yield wire
        found: Any = profile.events()
        wire.seconds = sum(e.device_time for e in found if e.name.startswith(_WIRE)) / 1e6
        return
    # The older profiler starts in no time; the newer one takes seconds to start on its first use.
    with torch.autograd.profiler.profile(use_kineto=False) as older:
        yield wire
    events: Any = older.function_events
    wire.seconds = sum(e.time_range.elapsed_us() for e in events if e.name.startswith(_WIRE)) / 1e6


def slowest(mesh: Mesh, waited: Tensor, seconds: float) -> tuple[int, float] | None:
    """The rank the others waited for, and how long; None where nobody stands out.

    Args:
        waited: seconds in collectives of every rank, [ranks].
        seconds: of the whole update.
    """
    if mesh.world_size == 1:
        return None
    least = int(waited.argmin())
    others = torch.cat([waited[:least], waited[least + 1 :]])
    behind = float(others.median() - waited[least])
    return (least, behind) if behind > STRAGGLING * seconds else None
