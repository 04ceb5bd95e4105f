"""The learning rate as a pure function of the update number: nothing to save, nothing to resume.

    warm-up      (update + 1) / warmup_steps                      for update < warmup_steps
    cosine       floor + (1 - floor) * (1 + cos(pi * progress)) / 2
    linear       floor + (1 - floor) * (1 - progress)
    progress     (update - warmup_steps) / (total_steps - warmup_steps)

as in the SLTrain reference, but for one thing: there the first update has factor 0/warmup_steps, so
it changes nothing and its batch is lost; here it has 1/warmup_steps. `cosine_restarts` repeats the
cosine with its warm-up every ``cycle_length`` updates.
"""

import math
from collections.abc import Callable

from sltrain_dist.config import OptimizerConfig
from sltrain_dist.utils.errors import UserError


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1 - progress


SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_restarts": _cosine,
}


def check_schedule(config: OptimizerConfig) -> None:
    """Validate the schedule's flags.

    Raises:
        UserError: unknown schedule, warm-up that leaves nothing to decay, a cycle that does not fit,
            or a floor outside [0, 1].
    """
    if config.scheduler not in SCHEDULES:
        raise UserError(
            f"--scheduler {config.scheduler}: unknown; schedules are {', '.join(SCHEDULES)}"
        )
    if not 0 <= config.min_lr_ratio <= 1:
        raise UserError(f"--min_lr_ratio {config.min_lr_ratio}: must lie in 0..1")
    period = _period(config)
    if not 0 <= config.warmup_steps < period:
        what = (
            "--cycle_length" if config.scheduler == "cosine_restarts" else "the number of updates"
        )
        raise UserError(
            f"--warmup_steps {config.warmup_steps}: must be at least 0 and below {what} ({period})"
        )
    if config.scheduler == "cosine_restarts" and config.total_steps % period:
        raise UserError(
            f"--cycle_length {period}: must divide the number of updates ({config.total_steps})"
        )


def _period(config: OptimizerConfig) -> int:
    """Updates from one warm-up to the next."""
    if config.scheduler == "cosine_restarts" and config.cycle_length is not None:
        return config.cycle_length
    return config.total_steps


def learning_rate(config: OptimizerConfig, update: int) -> float:
    """The learning rate of update ``update`` (the first is 0); beyond total_steps it stays at the floor."""
    period = _period(config)
    if config.scheduler == "cosine_restarts" and update < config.total_steps:
        update %= period
    if update < config.warmup_steps:
        return config.lr * (update + 1) / config.warmup_steps
    progress = min(1.0, (update - config.warmup_steps) / max(1, period - config.warmup_steps))
    floor = config.min_lr_ratio
    return config.lr * (floor + (1 - floor) * SCHEDULES[config.scheduler](progress))
