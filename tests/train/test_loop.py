"""What the loop does when something goes wrong: skipped updates, spikes, going back, a failing tracker."""

from types import SimpleNamespace

import pytest

from sltrain_dist.config import WatchConfig
from sltrain_dist.train import loop, tracker
from sltrain_dist.train.checkpoint import Found
from sltrain_dist.train.journal import check_prometheus
from sltrain_dist.train.watch import LossWatch, watch_config
from sltrain_dist.utils.errors import UserError

NAN = float("nan")


class Events:
    def __init__(self):
        self.written = []

    def event(self, event, step, **fields):
        self.written.append((event, step))


def stand(sigma=6.0, **watch):
    config = SimpleNamespace(
        optimizer=SimpleNamespace(lr=0.1), watch=WatchConfig(spike_sigma=sigma, **watch)
    )
    return SimpleNamespace(
        mesh=SimpleNamespace(is_first=True), config=config, step=8, skipped=0, rewinds=0,
        losses=LossWatch(sigma), journal=Events(), records=SimpleNamespace(folder="folder"),
    )  # fmt: skip


def parts():
    return SimpleNamespace(saves=SimpleNamespace(finish=lambda tries=0: None))


def test_skipped_updates_are_said_once_and_without_a_checkpoint_end_the_run(capsys, monkeypatch):
    monkeypatch.setattr(loop, "find", lambda *_: Found(None))
    run = stand(max_skips=5)
    for _ in range(4):
        loop._watch(run, parts(), NAN, NAN, 0)
    assert capsys.readouterr().out.count("update 8 skipped") == 1
    loop._watch(run, parts(), 1.0, 1.0, 0)
    assert run.skipped == 0
    loop._watch(run, parts(), 1.0, 1.0, 2)  # per-layer updates leave single blocks alone
    assert "warning: 2 blocks of update 8 skipped" in capsys.readouterr().out
    for _ in range(3):
        loop._watch(run, parts(), 1.0, float("inf"), 0)
    with pytest.raises(UserError, match=r"--lr 0\.1: 5 updates in a row.*no checkpoint"):
        loop._watch(run, parts(), 1.0, float("inf"), 0)
    assert run.journal.written.count(("skipped", 8)) == 9


def test_a_run_goes_back_only_so_often():
    run = stand(max_skips=1, max_rewinds=2)
    run.rewinds = 2
    with pytest.raises(UserError, match="after going back 2 times"):
        loop._watch(run, parts(), NAN, NAN, 0)


def test_a_spike_is_said_and_remembered_unless_it_was_skipped(capsys):
    run = stand(max_skips=99)
    for number in range(40):
        loop._watch(run, parts(), 3.0 + 0.01 * (number % 5), 1.0, 0)
    loop._watch(run, parts(), 4.0, 1.0, 0)
    assert "warning: update 8: its loss 4.000 stands" in capsys.readouterr().out
    assert run.losses.state()[-1] == 4.0, "it was trained on: the next ones are compared with it"
    run.losses.load_state(run.losses.state()[:-1])
    loop._watch(run, parts(), 4.0, NAN, 0)
    assert "update 8 skipped: its loss 4.000 stands" in capsys.readouterr().out
    assert run.losses.state()[-1] != 4.0
    assert run.journal.written == [("spike", 8), ("spike", 8), ("skipped", 8)]


def test_deviations_need_enough_losses_and_a_flat_curve_has_no_spikes():
    watch = LossWatch(6.0)
    for _ in range(31):
        watch.add(2.0)
    assert not watch.stands_out(9.0)
    watch.add(2.0)
    assert watch.stands_out(9.0)
    assert not watch.stands_out(2.005), "a thousandth of the mean is the least deviation"
    assert not watch.stands_out(NAN)
    assert not LossWatch(0.0).stands_out(9.0)
    again = LossWatch(6.0)
    again.load_state(watch.state())
    assert again.deviations(2.5) == watch.deviations(2.5)


@pytest.mark.parametrize("text", ["0", "3:2", "x", "1:y", ":", "-1:4", "10:12"])
def test_updates_to_profile_are_checked(text):
    settings = {
        "max_skips": 1, "max_rewinds": 1, "spike_sigma": 0.0, "spike_action": "log", "watch_every": 0,
        "prometheus": None,
    }  # fmt: skip
    assert watch_config(settings | {"profile": "3:5"}, 9).profile == (3, 5)
    assert watch_config(settings | {"profile": "7"}, 9).profile == (7, 7)
    with pytest.raises(UserError, match="--profile"):
        watch_config(settings | {"profile": text}, 9)


@pytest.mark.parametrize("place", ["", "missing/node.prom"])
def test_where_prometheus_looks_is_checked(tmp_path, place):
    check_prometheus(None)
    check_prometheus(str(tmp_path / "node.prom"))
    with pytest.raises(UserError, match="--prometheus"):
        check_prometheus(str(tmp_path / place))


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
