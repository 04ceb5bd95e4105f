"""The learning rate is a pure function of the update number, with the reference's shape."""

import dataclasses
import math

import pytest

from sltrain_dist.config import OptimizerConfig
from sltrain_dist.optim import SCHEDULES, check_schedule, learning_rate
from sltrain_dist.utils.errors import UserError

BASE = OptimizerConfig(lr=2.0, warmup_steps=10, total_steps=110, min_lr_ratio=0.1)


@pytest.mark.parametrize("scheduler", SCHEDULES)
def test_warm_up_reaches_the_peak_and_wastes_no_update(scheduler: str) -> None:
    config = dataclasses.replace(BASE, scheduler=scheduler, cycle_length=55)  # type: ignore[arg-type]
    assert learning_rate(config, 0) == pytest.approx(0.2)
    assert learning_rate(config, 9) == pytest.approx(2.0)
    assert learning_rate(config, 10) == pytest.approx(2.0)


def test_cosine_is_the_references_formula() -> None:
    """GaLore's and SLTrain's get_cyclical_cosine_schedule_with_min_lr, at the same progress."""
    for update in (10, 35, 60, 109):
        progress = (update - 10) / 100
        expected = 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
        assert learning_rate(BASE, update) == pytest.approx(expected)
    assert learning_rate(BASE, 110) == pytest.approx(0.2)
    assert learning_rate(BASE, 10_000) == pytest.approx(0.2)


def test_linear_falls_to_the_floor() -> None:
    config = dataclasses.replace(BASE, scheduler="linear")
    assert learning_rate(config, 60) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(config, 110) == pytest.approx(0.2)


def test_restarts_repeat_the_cycle_with_its_warm_up() -> None:
    config = dataclasses.replace(BASE, scheduler="cosine_restarts", cycle_length=55)
    check_schedule(config)
    assert [learning_rate(config, u) for u in range(55)] == [
        learning_rate(config, u) for u in range(55, 110)
    ]
    assert learning_rate(config, 54) < 0.21
    assert learning_rate(config, 110) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"scheduler": "step"}, "--scheduler step"),
        ({"warmup_steps": 110}, "--warmup_steps 110"),
        ({"warmup_steps": -1}, "--warmup_steps -1"),
        ({"min_lr_ratio": 1.5}, "--min_lr_ratio 1.5"),
        ({"scheduler": "cosine_restarts", "cycle_length": 50}, "--cycle_length 50"),
        ({"scheduler": "cosine_restarts", "cycle_length": 10}, "--warmup_steps 10"),
    ],
)
def test_bad_schedules_are_user_errors(change: dict[str, object], flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        check_schedule(dataclasses.replace(BASE, **change))  # type: ignore[arg-type]
