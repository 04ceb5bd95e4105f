"""What a run tells while it trains: traces, stragglers, trackers that go on as the same run, Prometheus."""

import gzip
import json
import shutil
import signal

import pytest

from tests.launcher.processes import (
    FAULTY,
    end,
    events,
    heartbeat,
    pause_file,
    start,
    torchrun,
    wait_until,
)
from tests.launcher.tiny import flags, metrics

QUIET = {"eval_every": 0, "save_every": 0}


def test_the_slowest_rank_is_named(inputs, tmp_path):
    """No clock of another rank is read: it is the rank that waits least in the collectives."""
    run = tmp_path / "run"
    line = flags(inputs, run, watch_every=3, num_training_steps=7, **QUIET)
    code, output = end(start(torchrun(2, FAULTY, *line), FAULTY_SLOW="1:0.7"))
    assert code == 0, output
    sampled = [x for x in metrics(run) if "seconds_communication" in x]
    assert [x["step"] for x in sampled] == [2, 5]
    assert [x.get("slowest_rank") for x in sampled] == [1, 1]
    for x in sampled:
        assert 0.35 < x["slowest_seconds"] < x["seconds"]
    assert [event["rank"] for event in events(run, "straggler")] == [1, 1]
    assert "rank 1 (" in heartbeat(run)["alarms"][0]


def test_profile_and_prometheus(inputs, tmp_path):
    run, target = tmp_path / "run", tmp_path / "node.prom"
    line = flags(inputs, run, profile="2:3", prometheus=target, **QUIET)
    code, output = end(start(["launcher/pretrain.py", *line]))
    assert code == 0, output
    with gzip.open(run / "profile" / "rank-00000-updates-2-3.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::mm" in names
    assert "ProfilerStep" not in str(names)
    assert "aten::mm" in (run / "profile" / "rank-00000-updates-2-3.txt").read_text()
    text = target.read_text()
    assert 'sltrain_step{run="run"} 6\n' in text
    assert 'sltrain_state{run="run",state="finished"} 1\n' in text
    assert "USDT" not in output, "torch's profiler is not to talk"


def test_a_profile_that_the_end_of_the_run_cuts_short_is_written(inputs, tmp_path):
    """By a signal in update 5, or by the last update."""
    run = tmp_path / "run"
    line = flags(inputs, run, profile="3:100", continue_from="auto", **QUIET)
    process = start([FAULTY, *line], FAULTY_PAUSE="4", FAULTY_FOLDER=str(tmp_path))
    wait_until(pause_file(tmp_path).exists, process)
    process.send_signal(signal.SIGTERM)
    pause_file(tmp_path).unlink()
    code, output = end(process)
    assert code == 75, output
    assert (run / "profile" / "rank-00000-updates-3-5.json.gz").exists()
    line = flags(inputs, tmp_path / "whole", profile="5:100", **QUIET)
    code, output = end(start(["launcher/pretrain.py", *line]))
    assert code == 0, output
    assert (tmp_path / "whole" / "profile" / "rank-00000-updates-5-6.json.gz").exists()


def test_trackers_go_on_as_the_same_run(inputs, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    line = flags(
        inputs, run, tracker="tensorboard", continue_from="auto", save_every=2, eval_every=0
    )
    code, output = end(start(["launcher/pretrain.py", *line]))
    assert code == 0, output
    shutil.rmtree(run / "step_6")  # as if it had died after update 4 was saved
    (run / "latest").unlink()
    code, output = end(start(["launcher/pretrain.py", *line]))
    assert code == 0, output
    curve = EventAccumulator(str(run / "tensorboard"))
    curve.Reload()
    assert [point.step for point in curve.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_wandb_offline_keeps_its_id(inputs, tmp_path):
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    line = flags(inputs, run, tracker="wandb", continue_from="auto", num_training_steps=4, **QUIET)
    for variables in ({"FAULTY_PAUSE": "2", "FAULTY_FOLDER": str(tmp_path)}, {}):
        process = start([FAULTY, *line], WANDB_MODE="offline", **variables)
        if variables:
            wait_until(pause_file(tmp_path).exists, process)
            process.send_signal(signal.SIGTERM)
            pause_file(tmp_path).unlink()
        code, output = end(process)
        assert code == (75 if variables else 0), output
    identity = json.loads((run / "tracker.json").read_text())["wandb"]
    segments = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert len(segments) == 2
    assert all(name.endswith(identity) for name in segments)
