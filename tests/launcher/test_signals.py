"""Signals at any moment: the step is finished, a checkpoint saved, the exit code 75, and the curve goes on bit for bit."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from sltrain_dist.utils.interrupt import REQUEUE, SAME_REQUEST
from tests.launcher.processes import (
    FAULTY,
    curve,
    end,
    events,
    heartbeat,
    pause_file,
    rank_process,
    start,
    torchrun,
    wait_until,
)
from tests.launcher.tiny import deepspeed, flags, losses


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The run that nobody interrupts, on one process."""
    run = tmp_path_factory.mktemp("whole") / "run"
    code, output = end(start(["launcher/pretrain.py", *flags(inputs, run)]))
    assert code == 0, output
    return run


@pytest.mark.parametrize(
    ("name", "pause"),
    [("SIGUSR1", "4"), ("SIGTERM", "evaluation"), ("SIGINT", "0")],
)
def test_interrupted_run_saves_and_goes_on_bit_for_bit(inputs, tmp_path, whole, name, pause):
    run = tmp_path / "run"
    line = flags(inputs, run, continue_from="auto")
    process = start([FAULTY, *line], FAULTY_PAUSE=pause, FAULTY_FOLDER=str(tmp_path))
    paused = pause_file(tmp_path)
    wait_until(paused.exists, process)
    process.send_signal(signal.Signals[name])
    process.send_signal(signal.Signals[name])  # launchers repeat what a scheduler has sent
    paused.unlink()
    code, output = end(process)
    assert code == REQUEUE, output
    assert f"interrupted by {name} after update" in output
    assert "Traceback" not in output
    assert heartbeat(run)["state"] == "interrupted"
    code, output = end(start(["launcher/pretrain.py", *line]))
    assert code == 0, output
    assert curve(run) == curve(whole)
    assert [event["event"] for event in events(run, "start", "interrupted", "finished", "failed")] == [
        "start", "interrupted", "start", "finished",
    ]  # fmt: skip
    assert heartbeat(run)["restarts"] == 1


def test_one_rank_of_two_is_signalled_and_both_save(inputs, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    arguments = {"grad_clipping": 1.0, "save_every": 0, "eval_every": 0}
    code, output = end(
        start(torchrun(2, "launcher/pretrain.py", *flags(inputs, whole, **arguments)))
    )
    assert code == 0, output
    line = flags(inputs, run, continue_from="auto", **arguments)
    process = start(torchrun(2, FAULTY, *line), FAULTY_PAUSE="3", FAULTY_FOLDER=str(tmp_path))
    for rank in (0, 1):
        wait_until(pause_file(tmp_path, rank).exists, process)
    second = rank_process(1, str(run))
    os.kill(second, signal.SIGUSR1)
    for rank in (0, 1):
        pause_file(tmp_path, rank).unlink()
    code, output = end(process)
    assert code != 0
    assert "interrupted by SIGUSR1 after update 4" in output
    assert heartbeat(run)["last_checkpoint"] == 4
    code, output = end(start(torchrun(2, "launcher/pretrain.py", *line)))
    assert code == 0, output
    assert losses(run) == losses(whole)


def test_a_later_second_signal_ends_at_once(inputs, tmp_path):
    run = tmp_path / "run"
    process = start([FAULTY, *flags(inputs, run)], FAULTY_PAUSE="2", FAULTY_FOLDER=str(tmp_path))
    wait_until(pause_file(tmp_path).exists, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(SAME_REQUEST + 4)  # the first one may be heard late on a busy machine
    assert process.poll() is None, "the first signal lets the step finish"
    process.send_signal(signal.SIGTERM)
    code, output = end(process, 20)
    assert code == 128 + signal.SIGTERM
    assert "a second SIGTERM: ending at once" in output


def test_torchrun_with_restarts_left_does_not_restart_an_interrupted_run(inputs, tmp_path):
    run = tmp_path / "run"
    command = torchrun(1, "--max_restarts=2", FAULTY, *flags(inputs, run))
    process = start(command, FAULTY_PAUSE="2", FAULTY_FOLDER=str(tmp_path))
    wait_until(pause_file(tmp_path).exists, process)
    os.kill(rank_process(0, str(run)), signal.SIGUSR1)
    pause_file(tmp_path).unlink()
    code, output = end(process)
    assert code == 0, output
    assert heartbeat(run)["state"] == "interrupted"
    assert [event["event"] for event in events(run)] == ["start", "saved", "interrupted"]


def test_while_data_is_prepared(inputs, tmp_path):
    """Tokenising may take hours; nothing half done is left, and a second start does it again."""
    text = tmp_path / "long.txt"
    text.write_text((inputs / "text.txt").read_text() * 60)
    line = flags(
        inputs, tmp_path / "run", corpus=text, cache_dir=tmp_path / "cache", tokenizer_vocab=512
    )
    process = start(["launcher/pretrain.py", *line])
    wait_until((tmp_path / "run" / "heartbeat.json").exists, process)
    process.send_signal(signal.SIGTERM)
    code, output = end(process, 60)
    assert code == REQUEUE, output
    assert "interrupted by SIGTERM while data was prepared" in output
    assert "Traceback" not in output
    assert heartbeat(tmp_path / "run")["state"] == "interrupted"


@pytest.mark.parametrize("whom", ["a rank", "the command"])
def test_deepspeed_hands_on_the_code_and_leaves_no_orphans(inputs, tmp_path, whom):
    """The deepspeed command, when it is ended alone, leaves its ranks running unless they notice."""
    run = tmp_path / "run"
    settings = {"num_training_steps": 100_000, "save_every": 0, "eval_every": 0}
    line = flags(inputs, run, ds_config="ds_configs/zero2.json", **settings)
    binary = Path(sys.executable).parent
    command = ["-m", "deepspeed.launcher.runner", *deepspeed(2, *line)[1:]]
    process = start(command, PATH=f"{binary}{os.pathsep}{os.environ['PATH']}")
    wait_until(lambda: (run / "metrics.jsonl").exists(), process)
    workers = [rank_process(rank, run) for rank in (0, 1)]
    if whom == "a rank":
        os.kill(workers[1], signal.SIGUSR1)
        assert end(process)[0] == REQUEUE
    else:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)  # until the last of its ranks has closed the pipe
        assert heartbeat(run)["state"] == "interrupted"
    wait_until(lambda: not any(os.path.exists(f"/proc/{worker}") for worker in workers), None, 60)
    assert events(run, "interrupted")[0]["signal"] == ("SIGUSR1" if whom == "a rank" else "SIGTERM")
    assert heartbeat(run)["last_checkpoint"] == heartbeat(run)["step"] > 0
