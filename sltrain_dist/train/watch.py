"""What a run does about losses and gradients that went wrong.

A gradient that is not finite is skipped by every engine; after --max_skips updates in a row that were skipped the
run goes back to its last checkpoint and on with the data after the bad batches, --max_rewinds times. A loss that
stands out by --spike_sigma standard deviations from those before it is said, and skipped where --spike_action asks
for it. All ranks see the same numbers, so all decide the same.
"""

import math
import statistics
from collections import deque
from typing import Any

from sltrain_dist.config import WatchConfig
from sltrain_dist.utils.errors import UserError

_WINDOW = 64  # losses that a new one is compared with
_ENOUGH = 32  # of them, before any stands out
_LEAST = (
    1e-3  # share of the mean that a deviation is taken for at least: a flat curve has no spikes
)


class LossWatch:
    """The losses of the last updates, and whether a new one stands out."""

    def __init__(self, sigma: float) -> None:
        self._sigma = sigma
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def add(self, loss: float) -> None:
        """Remember the loss of an update."""
        if math.isfinite(loss):
            self._losses.append(loss)

    def deviations(self, loss: float) -> tuple[float, float]:
        """(mean of the losses remembered, by how many of their standard deviations ``loss`` lies above it)."""
        if len(self._losses) < _ENOUGH or not math.isfinite(loss):
            return loss, 0.0
        mean = statistics.fmean(self._losses)
        spread = max(statistics.stdev(self._losses), _LEAST * abs(mean))
        return mean, (loss - mean) / spread if spread else 0.0

    def stands_out(self, loss: float) -> bool:
        """Whether ``loss`` is a spike; never where spikes are not watched for."""
        return self._sigma > 0 and self.deviations(loss)[1] > self._sigma

    def state(self) -> list[float]:
        """What a checkpoint keeps, so that a resumed run decides as the uninterrupted one."""
        return list(self._losses)

    def load_state(self, losses: list[float]) -> None:
        """Take over `state`."""
        self._losses = deque(losses, maxlen=_WINDOW)


def watch_config(settings: dict[str, Any], total_steps: int) -> WatchConfig:
    """The flags of watching, checked against each other and the number of updates.

    Raises:
        UserError: naming the flag.
    """
    sigma, action = settings["spike_sigma"], settings["spike_action"]
    if action == "skip" and sigma == 0:
        raise UserError(
            "--spike_action skip: --spike_sigma 0 watches for no spikes; give it, e.g. 6"
        )
    return WatchConfig(
        max_skips=settings["max_skips"],
        max_rewinds=settings["max_rewinds"],
        spike_sigma=sigma,
        spike_action=action,
        sample_every=settings["watch_every"],
        prometheus=settings["prometheus"],
        profile=_updates(settings["profile"], total_steps),
    )


def _updates(text: str | None, total_steps: int) -> tuple[int, int] | None:
    """ "10:12" or "10" as (first, last) update."""
    if text is None:
        return None
    first, _, last = text.partition(":")
    try:
        updates = int(first), int(last or first)
    except ValueError:
        updates = 0, 0
    if not 1 <= updates[0] <= updates[1]:
        raise UserError(f"--profile {text}: must be updates, as 10:12 or 10, counted from 1")
    if updates[0] > total_steps:
        raise UserError(f"--profile {text}: the run ends with update {total_steps}")
    return updates
