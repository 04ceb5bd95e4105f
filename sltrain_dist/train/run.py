"""A run in progress: its parts, and where it stands."""

import signal
import time
from dataclasses import dataclass, field

from sltrain_dist.config import TrainConfig
from sltrain_dist.data import Data
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.parallel.mesh import Mesh, gather_numbers
from sltrain_dist.train.checkpoint import Progress
from sltrain_dist.train.journal import Journal
from sltrain_dist.train.linear_paths import LinearPaths
from sltrain_dist.train.run_folder import Records
from sltrain_dist.train.tracker import Tracker
from sltrain_dist.train.watch import LossWatch
from sltrain_dist.utils.interrupt import requested


@dataclass
class Run:
    """A run in progress: its parts, and where it stands (``step`` updates done)."""

    config: TrainConfig
    mesh: Mesh
    data: Data
    engine: Engine
    records: Records
    journal: Journal
    tracker: Tracker
    parameters: dict[str, int]  # params.count_parameters
    estimate: dict[str, int]  # bytes by purpose, before training
    linear_paths: LinearPaths  # how the model's linears are computed, and who chose it
    baseline: int  # bytes a rank used before the model existed: the interpreter and its libraries
    step: int = 0
    tokens_seen: int = 0
    skipped: int = 0  # updates in a row whose gradient was not finite
    lock: object = None  # held until the process ends: no second run writes in the folder
    hosts: list[str] = field(default_factory=list)  # of every rank
    position: int = 0  # batches of the data read: ``step``, and more after going back past bad ones
    started_at: int = 0  # step of this segment's start
    trained: float = 0.0  # seconds of the updates that count, over all segments
    rewinds: int = 0  # times that the run went back to a checkpoint
    kept: int = -1  # step of the checkpoint in its own folder that it stands on
    evaluated: tuple[float, int] | None = None  # held-out (loss, tokens) of this very step
    missed: bool = False  # an evaluation was due when the run was interrupted
    began: float = field(
        default_factory=time.perf_counter
    )  # less the seconds before the last resume
    losses: LossWatch = field(default_factory=lambda: LossWatch(0.0))

    @property
    def evaluation_due(self) -> bool:
        """Whether this step is one to evaluate at, and that is not done yet."""
        every, last = self.config.eval_every, self.config.optimizer.total_steps
        regular = self.step > self.started_at and every and self.step % every == 0
        return self.evaluated is None and bool(self.missed or regular or self.step >= last)

    def seconds(self) -> float:
        """Wall time of the run, over all segments, what was lost between them left out."""
        return time.perf_counter() - self.began

    def asked(self) -> int:
        """The number of a signal that some rank was sent to end the run, or 0; collective."""
        return int(gather_numbers(self.mesh, (signal_number(),)).max())

    def count(self, tokens: int, seconds: float) -> None:
        """Note that an update was done."""
        self.step, self.position = self.step + 1, self.position + 1
        self.tokens_seen, self.trained = self.tokens_seen + tokens, self.trained + seconds
        self.evaluated, self.missed = None, False

    def progress(self) -> Progress:
        """Where the run stands, for a checkpoint."""
        metrics = self.records.position() | {
            "seconds": self.seconds(),
            "trained": self.trained,
            "losses": self.losses.state(),
            "skipped": self.skipped,
            "rewinds": self.rewinds,
            "evaluated": self.evaluated,
            "missed": self.evaluation_due,
        }
        return Progress(self.step, self.tokens_seen, self.data.state(self.position), metrics)

    def take(self, progress: Progress, position: int | None = None) -> None:
        """Stand where ``progress`` says; ``position``: but read on from this batch."""
        metrics = progress.metrics
        self.step, self.tokens_seen = progress.step, progress.tokens_seen
        self.started_at, self.skipped = self.step, int(metrics.get("skipped", 0))
        self.rewinds = max(self.rewinds, int(metrics.get("rewinds", 0)))
        self.trained = float(metrics.get("trained", metrics.get("seconds", 0.0)))
        self.losses.load_state(metrics.get("losses", []))
        evaluated = metrics.get("evaluated")
        self.evaluated = None if evaluated is None else (evaluated[0], evaluated[1])
        self.missed = bool(metrics.get("missed"))
        self.position = int(progress.data["update"]) if position is None else position


def signal_number() -> int:
    """The signal that asked this process to end, or 0."""
    name = requested()
    return signal.Signals[name].value if name else 0
