"""Optimizers and learning-rate schedules, one table of each."""

from sltrain_dist.optim.schedule import SCHEDULES, check_schedule, learning_rate
from sltrain_dist.optim.table import OPTIMIZERS, OptimizerFactory, assert_live, describe

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "OptimizerFactory",
    "assert_live",
    "check_schedule",
    "describe",
    "learning_rate",
]
