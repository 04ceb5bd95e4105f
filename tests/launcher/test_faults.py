"""Faults that a run survives by itself: bad batches, spikes, dead and hung ranks, full disks, launchers that are gone."""

import json
import math
import os
import shutil
import signal
import time

import pytest

from sltrain_dist.parallel.mesh import free_port
from tests.launcher.processes import (
    FAULTY,
    curve,
    end,
    events,
    fill,
    heartbeat,
    pause_file,
    rank_process,
    start,
    torchrun,
    wait_until,
)
from tests.launcher.tiny import flags, losses, metrics

QUIET = {"eval_every": 0, "grad_clipping": 1.0}


def test_bad_batches_send_the_run_back_and_past_them(inputs, tmp_path):
    run = tmp_path / "run"
    settings = QUIET | {"num_training_steps": 9, "save_every": 3, "max_skips": 3, "keep_last": 9}
    code, output = end(start([FAULTY, *flags(inputs, run, **settings)], FAULTY_NAN="4:7"))
    assert code == 0, output
    assert "3 updates in a row were skipped, up to 7: back to step_3, on with batch 8" in output
    (rewind,) = events(run, "rewind")
    assert (rewind["step"], rewind["position"]) == (3, 7), "nothing was saved among bad batches"
    assert sorted(losses(run)) == list(range(1, 10)), "no step twice, none missing"
    assert all(math.isfinite(loss) for loss in losses(run).values())
    states = {n: json.loads((run / f"step_{n}" / "state.json").read_text()) for n in (3, 9)}
    assert states[3]["data"]["update"] == 7, "a restart must not meet the bad batches again"
    assert states[9]["data"]["update"] == 13
    again = tmp_path / "again"
    shutil.copytree(run, again)
    for name in ("step_9", "step_6"):
        shutil.rmtree(again / name)
    line = flags(inputs, again, continue_from="auto", **settings)
    code, output = end(start([FAULTY, *line], FAULTY_NAN="4:7"))
    assert code == 0, output
    assert losses(again) == losses(run)


def test_a_spike_is_left_out_where_that_is_asked_for(inputs, tmp_path):
    run = tmp_path / "run"
    settings = QUIET | {"num_training_steps": 42, "total_batch_size": 2, "save_every": 0}
    line = flags(inputs, run, spike_sigma=20, spike_action="skip", **settings)
    code, output = end(start([FAULTY, *line], FAULTY_SPIKE="38"))
    assert code == 0, output
    (spike,) = events(run, "spike")
    assert (spike["step"], spike["skipped"]) == (39, True)
    (line,) = [x for x in metrics(run) if x["step"] == 39 and "loss" in x]
    assert line["grad_norm"] is None, "the weights were left alone"
    assert "update 39 skipped: its loss" in output


def test_a_stopped_rank_is_named_and_the_others_end(inputs, tmp_path, stop):
    run = tmp_path / "run"
    line = flags(inputs, run, timeout=8, **QUIET)
    process = start(torchrun(2, FAULTY, *line), FAULTY_PAUSE="3", FAULTY_FOLDER=str(tmp_path))
    for rank in (0, 1):
        wait_until(pause_file(tmp_path, rank).exists, process)
    time.sleep(1)  # until its place has been told
    stop(rank_process(1, run))
    for rank in (0, 1):
        pause_file(tmp_path, rank).unlink()
    code, output = end(process)
    assert code == 1
    assert "rank 1 (" in output, output
    assert "gives no sign of life; it stood in training of update 4" in output, output
    assert heartbeat(run)["state"] == "failed"
    stacks = (run / "faults" / "rank-00000-stacks.txt").read_text()
    assert "update.py" in stacks
    assert json.loads((run / "faults" / "rank-00000-collectives.json").read_text())["entries"]


def test_a_stopped_rank_that_keeps_the_store_keeps_nobody_waiting(inputs, tmp_path, stop):
    """Under deepspeed that is rank 0: nobody answers then who could say which rank is missing."""
    run = tmp_path / "run"
    line = flags(inputs, run, timeout=8, **QUIET)
    command = ["-m", "deepspeed.launcher.runner", "--num_gpus=2", f"--master_port={free_port()}"]
    process = start([*command, FAULTY, *line], FAULTY_PAUSE="3", FAULTY_FOLDER=str(tmp_path))
    for rank in (0, 1):
        wait_until(pause_file(tmp_path, rank).exists, process)
    stop(rank_process(0, run))
    for rank in (0, 1):
        pause_file(tmp_path, rank).unlink()
    code, output = end(process)
    assert code == 1, output
    assert "rank 0, or the launcher that keeps the ranks' store, is gone or stands still" in output


def test_a_killed_rank_is_restarted_by_torchrun_and_the_curve_is_the_same(inputs, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = QUIET | {"num_training_steps": 10, "save_every": 2}
    code, output = end(
        start(torchrun(2, "launcher/pretrain.py", *flags(inputs, whole, **settings)))
    )
    assert code == 0, output
    line = flags(inputs, run, continue_from="auto", **settings)
    command = torchrun(2, "--max_restarts=2", FAULTY, *line)
    process = start(command, FAULTY_PAUSE="5", FAULTY_FOLDER=str(tmp_path))
    for rank in (0, 1):
        wait_until(pause_file(tmp_path, rank).exists, process)
    os.kill(rank_process(1, run), signal.SIGKILL)
    for rank in (0, 1):  # and again after the restart, which must not wait for ever
        pause_file(tmp_path, rank).unlink()
    wait_until(pause_file(tmp_path, 1).exists, process)
    for rank in (0, 1):
        wait_until(pause_file(tmp_path, rank).exists, process)
        pause_file(tmp_path, rank).unlink()
    code, output = end(process)
    assert code == 0, output
    assert curve(run) == curve(whole)
    assert len(events(run, "start")) == 2
    # Elastic: one rank goes on where two were, on the same samples.
    more = QUIET | {"num_training_steps": 12, "save_every": 0, "warmup_steps": 2}
    for folder, ranks in ((whole, 2), (run, 1)):
        line = flags(inputs, folder, continue_from="auto", **more)
        code, output = end(start(torchrun(ranks, "launcher/pretrain.py", *line)))
        assert code == 0, output
    assert losses(run)[12] == pytest.approx(losses(whole)[12], abs=1e-4)


def test_nodes_meet_again_after_a_rank_of_one_was_killed(inputs, tmp_path):
    """Two torchruns, as on two nodes: only the one whose rank failed counts a restart."""
    run, port = tmp_path / "run", free_port()
    settings = QUIET | {"num_training_steps": 10, "save_every": 2, "timeout": 60}
    line = flags(inputs, run, continue_from="auto", **settings)
    paused = {"FAULTY_PAUSE": "5", "FAULTY_FOLDER": str(tmp_path)}

    def node(number):
        command = [
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc_per_node=1",
            "--max_restarts=2",
        ]
        command += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=meeting"]
        return start([*command, f"--rdzv_conf=is_host={number == 0}", FAULTY, *line], **paused)

    nodes = [node(0), node(1)]
    for _ in range(2):  # before and after the restart
        for rank in (0, 1):
            wait_until(pause_file(tmp_path, rank).exists, nodes[0])
        if not events(run, "failed"):
            os.kill(rank_process(1, run), signal.SIGKILL)
        for rank in (0, 1):
            pause_file(tmp_path, rank).unlink()
    for process in nodes:
        code, output = end(process)
        assert code == 0, output
    assert len(events(run, "start")) == 2
    assert sorted(losses(run)) == list(range(1, 11))


def test_workers_end_when_their_launcher_is_gone(inputs, tmp_path):
    run = tmp_path / "run"
    line = flags(inputs, run, num_training_steps=100_000, save_every=0, eval_every=0, timeout=20)
    process = start(torchrun(1, "launcher/pretrain.py", *line))
    wait_until(lambda: (run / "metrics.jsonl").exists(), process)
    worker = rank_process(0, run)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    for _ in range(600):
        if not os.path.exists(f"/proc/{worker}") or heartbeat(run)["state"] == "interrupted":
            break
        time.sleep(0.1)
    assert heartbeat(run)["state"] == "interrupted"
    assert events(run, "interrupted")[0]["signal"] == "SIGTERM"


def test_a_full_disk_costs_no_update_and_the_save_is_tried_again(inputs, tmp_path, small_disk):
    run = small_disk / "run"
    settings = QUIET | {"num_training_steps": 30, "save_every": 4, "keep_last": 1, "timeout": 60}
    process = start(
        [FAULTY, *flags(inputs, run, **settings)], FAULTY_PAUSE="2 20", FAULTY_FOLDER=str(tmp_path)
    )
    wait_until(pause_file(tmp_path).exists, process)
    ballast = fill(small_disk)
    pause_file(tmp_path).unlink()
    wait_until(lambda: not pause_file(tmp_path).exists(), process)
    wait_until(pause_file(tmp_path).exists, process)
    assert "was not saved" in heartbeat(run)["alarms"][0]
    assert heartbeat(run)["last_checkpoint"] is None
    ballast.unlink()
    pause_file(tmp_path).unlink()
    code, output = end(process)
    assert code == 0, output
    assert "was not saved" in output
    assert "training goes on" in output
    assert heartbeat(run)["last_checkpoint"] == 30
    assert heartbeat(run)["alarms"] == []
    assert sorted(losses(run)) == list(range(1, 31)), "lines wait for room, too"
