"""What the loop does when something goes wrong: skipped updates, a failing tracker, a save that never stands."""

from types import SimpleNamespace

import pytest

from sltrain_dist.train import loop, tracker
from sltrain_dist.utils.errors import UserError


def stand():
    config = SimpleNamespace(optimizer=SimpleNamespace(lr=0.1))
    return SimpleNamespace(mesh=SimpleNamespace(is_first=True), config=config, step=7, skipped=0)


def test_skipped_updates_are_said_once_and_end_the_run(capsys):
    run = stand()
    for _ in range(loop.SKIPS_IN_A_ROW - 1):
        loop._watch(run, float("nan"))
    assert capsys.readouterr().out.count("update 8 skipped") == 1
    loop._watch(run, 1.0)
    assert run.skipped == 0
    loop._watch(run, 1.0, blocks=2)  # per-layer updates leave single blocks alone
    assert "warning: 2 blocks of update 8 skipped" in capsys.readouterr().out
    loop._watch(run, 1.0)
    for _ in range(loop.SKIPS_IN_A_ROW - 1):
        loop._watch(run, float("inf"))
    with pytest.raises(UserError, match=r"--lr 0\.1"):
        loop._watch(run, float("inf"))


def test_a_failing_tracker_does_not_end_the_training(capsys):
    class Full(tracker.NoTracker):
        description = "full"

        def log(self, line):
            raise OSError("No space left on device")

    guarded = tracker._Guarded(Full())
    guarded.log({"step": 1})
    guarded.log({"step": 2})
    guarded.close()
    assert capsys.readouterr().err.count("training goes on without it") == 1
