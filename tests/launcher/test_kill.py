"""SIGKILL at random moments, many of them inside a save: every restart finds a whole checkpoint, same curve."""

import random
import signal
import subprocess
import sys
import time

import pytest

from tests.launcher.tiny import REPOSITORY, flags, losses, metrics

UPDATES = 40


def start(line):
    return subprocess.Popen(
        [sys.executable, "launcher/pretrain.py", *line],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def lines_written(run):
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_progress(process, run, lines):
    """Until the run has written ``lines`` more lines of metrics, or has ended."""
    goal = lines_written(run) + lines
    while process.poll() is None and lines_written(run) < goal:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("kills", "async_save"),
    [(2, "no"), (2, "yes"), pytest.param(10, "yes", marks=pytest.mark.slow)],
)
def test_killed_run_continues_on_the_same_curve(bare, inputs, tmp_path, kills, async_save):
    settings = {"num_training_steps": UPDATES, "save_every": 1, "eval_every": 0}
    assert bare(flags(inputs, tmp_path / "whole", **settings)) == 0
    settings["async_save"] = async_save
    run = tmp_path / "killed"
    line = flags(inputs, run, continue_from="auto", **settings)
    seed = random.randrange(10**6)
    generator = random.Random(seed)
    for number in range(kills):
        process = start(line)
        wait_for_progress(process, run, generator.randint(1, UPDATES // (kills + 1)))
        time.sleep(generator.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, f"seed {seed}, kill {number}:\n{output}"
        assert "damaged" not in output
    process = start(line)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "continuing from" in output
    assert losses(run) == losses(tmp_path / "whole"), f"seed {seed}"
    steps = [line["step"] for line in metrics(run) if "loss" in line]
    assert steps == list(range(1, UPDATES + 1)), f"seed {seed}"  # none twice
