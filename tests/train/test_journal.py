"""Events that are never lost, heartbeats that are always whole, and disks that refuse."""

import json
import os
import time

import pytest

from sltrain_dist.train import journal
from sltrain_dist.train.journal import Journal, prometheus_text, read_events


def heartbeat(folder):
    return json.loads((folder / "heartbeat.json").read_text())


def test_events_are_appended_over_restarts_and_torn_lines_lost_alone(tmp_path):
    first = Journal(tmp_path, True)
    first.event("start", 0, hosts=["a"])
    first.event("skipped", 3, loss=float("nan"))
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"time": 1, "ev')  # the machine went down here
    second = Journal(tmp_path, True)
    assert second.restarts == 1
    assert second.born == read_events(tmp_path)[0]["time"]
    second.event("start", 3)
    events = read_events(tmp_path)
    assert [event["event"] for event in events] == ["start", "skipped", "start"]
    assert events[1]["loss"] is None, "JSON has no name for NaN"


def test_heartbeat_comes_with_every_change_of_state_and_else_once_a_second(tmp_path, monkeypatch):
    pulse = Journal(tmp_path, True)
    pulse.beat("starting", total_steps=9)
    for step in range(5):
        pulse.beat("training", step=step)
    assert heartbeat(tmp_path)["step"] == 0, (
        "the state changed at step 0, then less than a second went by"
    )
    monkeypatch.setattr(journal, "_INTERVAL", 0.0)
    pulse._next = 0.0
    pulse.alarm("save", "disk full")
    pulse.beat("training", step=5)
    document = heartbeat(tmp_path)
    assert (document["step"], document["total_steps"], document["alarms"]) == (5, 9, ["disk full"])
    pulse.alarm("save", None)
    pulse.beat("saving")
    assert heartbeat(tmp_path)["alarms"] == []
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_a_slow_disk_is_written_to_less_often(tmp_path, monkeypatch):
    pulse = Journal(tmp_path, True)
    written = []

    def slow(path, text):
        time.sleep(0.05)
        written.append(path)

    monkeypatch.setattr(journal, "_replace", slow)
    pulse.beat("training")
    for _ in range(1000):
        pulse.beat("training")
    assert len(written) == 1
    assert pulse._next - time.monotonic() > 1.5, "fifty times as long as the write took"


def test_other_ranks_write_nothing_and_a_refusing_disk_is_said_once(tmp_path, capsys):
    silent = Journal(tmp_path, False)
    silent.event("start", 0)
    silent.beat("training")
    assert os.listdir(tmp_path) == []
    gone = Journal(tmp_path / "gone", True)
    gone.event("start", 0)
    gone.event("finished", 0)
    gone.beat("training")
    gone.event("finished", 0)
    assert capsys.readouterr().err.count("training goes on") == 2, "events and heartbeat, once each"


def test_goodput_is_what_was_trained_of_the_time_since_the_first_start(tmp_path):
    (tmp_path / "events.jsonl").write_text(
        json.dumps({"time": time.time() - 100, "event": "start"})
    )
    assert Journal(tmp_path, True).goodput(50.0) == pytest.approx(0.5, abs=0.02)


def test_prometheus_text_escapes_and_leaves_out_what_is_not_known(tmp_path):
    target = tmp_path / "sltrain.prom"
    pulse = Journal(tmp_path, True, str(target))
    pulse.beat("training", step=7, loss=float("nan"), goodput=0.5)
    text = target.read_text()
    run = tmp_path.name
    assert f'sltrain_step{{run="{run}"}} 7\n' in text
    assert f'sltrain_goodput{{run="{run}"}} 0.5\n' in text
    assert "sltrain_loss" not in text
    assert f'sltrain_state{{run="{run}",state="training"}} 1\n' in text
    hostile = prometheus_text({"state": "training", "alarms": []}, 'a"b\\c\nd')
    assert 'run="a\\"b\\\\c d"' in hostile
