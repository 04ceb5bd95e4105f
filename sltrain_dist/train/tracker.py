"""Where curves go beside metrics.jsonl: Weights & Biases or TensorBoard, on the first rank only.

wandb runs offline unless it is logged in, and never asks anything. A run that is continued goes on as the same run
there: its id stands in tracker.json of the run folder.
"""

import importlib.util
import json
import netrc
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from sltrain_dist.config import TrainConfig
from sltrain_dist.utils.errors import UserError


class Tracker(Protocol):
    """Takes the same lines as metrics.jsonl."""

    description: str

    def log(self, line: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class NoTracker:
    """Throws everything away."""

    description = "none"

    def log(self, line: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class _Wandb:
    def __init__(self, config: TrainConfig, folder: Path, step: int) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
        identity = _identity(folder / "tracker.json", lambda: uuid.uuid4().hex[:12])
        self._run = wandb.init(
            id=identity,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", "sltrain_dist"),
            name=config.name or folder.name,
            tags=list(config.tags),
            dir=str(folder),
            config=config.to_json(),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off"),
        )
        # An axis of our own: wandb's must not go back, and a run that is continued does.
        self._run.define_metric("*", step_metric="step")
        self.description = f"wandb, {mode}, run {identity}"

    def log(self, line: dict[str, Any]) -> None:
        self._run.log(line)

    def close(self) -> None:
        self._run.finish()


def _identity(path: Path, make: Callable[[], str]) -> str:
    """The run's id at wandb: the one it had before, else a new one that is kept."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["wandb"])
    except (OSError, ValueError, KeyError, TypeError):
        identity = make()
        path.write_text(json.dumps({"wandb": identity}) + "\n", encoding="utf-8")
        return identity


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class _TensorBoard:
    def __init__(self, config: TrainConfig, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was logged after the checkpoint that is continued is trained again, and hidden.
        self._writer = SummaryWriter(
            str(folder / "tensorboard"), purge_step=step + 1 if step else None
        )
        self._writer.add_text("command", " ".join(config.command))
        self.description = "tensorboard"

    def log(self, line: dict[str, Any]) -> None:
        for key, value in line.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(key, value, line["step"])

    def close(self) -> None:
        self._writer.close()


TRACKERS: dict[str, Callable[[TrainConfig, Path, int], Tracker]] = {
    "wandb": _Wandb,
    "tensorboard": _TensorBoard,
}


class _Guarded:
    """A tracker that may fail (its disk full, its service gone) without ending the training."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self.description = tracker.description

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            print(
                f"warning: tracker {self.description}: {error}; training goes on without it",
                file=sys.stderr,
            )
            self._tracker = NoTracker()

    def log(self, line: dict[str, Any]) -> None:
        self._attempt(lambda: self._tracker.log(line))

    def close(self) -> None:
        self._attempt(self._tracker.close)


def check_tracker(name: str) -> None:
    """Refuse a named tracker that is not installed; on every rank, before anything is built.

    Raises:
        UserError: naming the package to install.
    """
    if name in TRACKERS and importlib.util.find_spec(name) is None:
        raise UserError(f"--tracker {name}: not installed; pip install {name}")


def open_tracker(config: TrainConfig, folder: Path, step: int) -> Tracker:
    """The tracker that --tracker names, ``auto`` the first one installed, or none; to go on after update ``step``."""
    wanted = list(TRACKERS) if config.tracker == "auto" else [config.tracker]
    for name in wanted:
        if name in TRACKERS and importlib.util.find_spec(name) is not None:
            return _Guarded(TRACKERS[name](config, folder, step))
    return NoTracker()
