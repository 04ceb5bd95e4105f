"""What checks of the doctor get and give: the visit (a launch of ranks and the run that is planned), and outcomes.

A check runs on every rank at once and may gather values of all ranks; each rank returns its own outcome, and the one
verdict is made of them by `merge`, the same on every rank.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sltrain_dist.config import TrainConfig
from sltrain_dist.parallel.mesh import Mesh
from sltrain_dist.parallel.reach import Meeting
from sltrain_dist.params import count_parameters
from sltrain_dist.tools.plan import Device, blank_model


@dataclass(frozen=True)
class Outcome:
    """What a check found, and the mend where it failed."""

    status: Literal["passed", "failed", "skipped"]
    found: str
    mend: str = ""


def passed(found: str) -> Outcome:
    """Nothing to mend."""
    return Outcome("passed", found)


def failed(found: str, mend: str) -> Outcome:
    """Something to mend before the run is started."""
    return Outcome("failed", found, mend)


def skipped(reason: str) -> Outcome:
    """Not looked at."""
    return Outcome("skipped", reason)


def refusal(message: str) -> Outcome:
    """A UserError's line, whose last clause is the mend, as an outcome."""
    found, _, mend = message.rpartition("; ")
    return failed(found, mend) if found else failed(mend, "change that flag")


@dataclass(frozen=True)
class Options:
    """The doctor's own flags.

    meet_timeout: seconds until a missing rank is named. trial_timeout: of each run of the trial, seconds.
    gpu_memory: bytes of a rank's device or its share of the host; None: as measured. pretrain: launcher/pretrain.py.
    """

    meet_timeout: float
    trial_timeout: float
    gpu_memory: int | None
    pretrain: Path


class Visit:
    """A launch of ranks, and the run that it would be: filled by the checks as they go.

    limit: bytes that a rank may take, from memory on, where known. mesh: from links on. folder: a temporary one
    where checkpoints will lie, from save_dir on.
    """

    def __init__(
        self, arguments: tuple[str, ...], config: TrainConfig, options: Options, meeting: Meeting
    ) -> None:
        self.arguments, self.config, self.options, self.meeting = (
            arguments,
            config,
            options,
            meeting,
        )
        self.device: Device = "cuda" if torch.cuda.is_available() else "cpu"
        self.limit: int | None = None
        self.mesh: Mesh | None = None
        self.folder: Path | None = None

    @cached_property
    def blank(self) -> nn.Module:
        """The model of a rank without memory."""
        return blank_model(self.config)

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Trained elements by kind."""
        return count_parameters(self.blank)

    @property
    def save_dir(self) -> Path:
        """Where the run will save, or the folder of runs where it chooses a new one there."""
        config = self.config
        if config.save_dir:
            return Path(config.save_dir)
        if config.continue_from and config.continue_from != "auto":
            source = Path(config.continue_from)
            return source.resolve().parent if source.name.startswith("step_") else source
        return Path("runs")

    def first_other(self, values: list[Any]) -> int | None:
        """The first rank whose value is not rank 0's."""
        return next((rank for rank, value in enumerate(values) if value != values[0]), None)


@dataclass(frozen=True)
class Check:
    """A row of the table.

    needs: checks that must not have failed. seconds: that a rank may take longer than the others.
    """

    name: str
    run: Callable[[Visit], Outcome]
    needs: tuple[str, ...] = ("meet",)
    seconds: float = 120.0


@dataclass(frozen=True)
class Result:
    """A check's verdict over all ranks."""

    name: str
    outcome: Outcome
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """One flat object."""
        return {"name": self.name, **asdict(self.outcome), "seconds": round(self.seconds, 3)}


def merge(outcomes: list[Outcome | None], meeting: Meeting) -> Outcome:
    """The verdict of all ranks: failed where any has failed; None of a rank that left for another's failure."""
    bad = [rank for rank, one in enumerate(outcomes) if one is not None and one.status == "failed"]
    if not bad:
        return next(one for one in outcomes if one is not None)
    first = outcomes[bad[0]]
    assert first is not None
    if meeting.world_size == 1 or (len(bad) == meeting.world_size and len(set(outcomes)) == 1):
        return first
    more = f" (and {len(bad) - 1} more ranks)" if len(bad) > 1 else ""
    return failed(f"{meeting.place(bad[0])}{more}: {first.found}", first.mend)
