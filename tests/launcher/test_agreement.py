"""What two ranks must do alike under every engine: leave out bad updates, go back, and know how a save ended."""

import gzip
import json
import math

import pytest

from tests.launcher.processes import (
    FAULTY,
    end,
    events,
    fill,
    heartbeat,
    pause_file,
    start,
    torchrun,
    wait_until,
)
from tests.launcher.tiny import flags, losses, metrics

ENGINES = {
    "fsdp": {},
    "per layer, 8 bits": {"optimizer": "adam8bit_per_layer", "grad_clipping": 0.0},
    "zero2": {"ds_config": "ds_configs/zero2.json"},
    "zero3": {"ds_config": "ds_configs/zero3.json"},
}
QUIET = {"eval_every": 0}
each_engine = pytest.mark.parametrize(
    "engine",
    [
        pytest.param(name, marks=[] if name in ("fsdp", "zero2") else pytest.mark.slow)
        for name in ENGINES
    ],
)


def run_on(ranks, line, **variables):
    """Everything that these ranks printed, once they have ended well."""
    code, output = end(start(torchrun(ranks, FAULTY, *line), **variables))
    assert code == 0, output
    return output


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """A folder that is read as a stream, as C4 is: two files to train on, one to evaluate on."""
    import argparse
    import optparse
    from pathlib import Path

    folder = tmp_path_factory.mktemp("c4")
    (folder / "en").mkdir()
    lines = [
        line
        for module in (argparse, optparse)
        for line in Path(module.__file__).read_text().split("\n\n")
    ]
    parts = {
        "train.00000-of-00002": lines[::3],
        "train.00001-of-00002": lines[1::3],
        "validation.00000-of-00001": lines[2::3],
    }
    for name, part in parts.items():
        with gzip.open(folder / "en" / f"c4-{name}.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in part)
    return f"c4:{folder}"


@each_engine
def test_bad_batches_send_all_ranks_back(inputs, tmp_path, engine):
    """Three in a row: back to update 4, past batches 6 to 8; one rank alone does the same."""
    settings = QUIET | {"num_training_steps": 9, "save_every": 4, "max_skips": 3} | ENGINES[engine]
    curves = []
    for ranks in (2, 1):
        run = tmp_path / f"run-{ranks}"
        output = run_on(ranks, flags(inputs, run, **settings), FAULTY_NAN="5:8")
        assert "3 updates in a row were skipped, up to 8: back to step_4, on with batch 9" in output
        (rewind,) = events(run, "rewind")
        assert (rewind["step"], rewind["position"]) == (4, 8)
        assert [event["step"] for event in events(run, "skipped")] == [6, 7, 8]
        curves.append(losses(run))
        assert sorted(curves[-1]) == list(range(1, 10)), "no step twice, none missing"
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


def test_a_stream_is_read_on_past_bad_batches(inputs, stream, tmp_path):
    settings = QUIET | {
        "num_training_steps": 9,
        "save_every": 4,
        "max_skips": 3,
        "corpus": stream,
        "tokenizer": "trained",
    }
    read = {}
    for name, updates, bad in (("run", 9, "5:8"), ("whole", 13, "-1")):
        folder = tmp_path / name
        folder.mkdir()
        line = flags(inputs, folder / "run", **settings | {"num_training_steps": updates})
        run_on(2, line, FAULTY_NAN=bad, FAULTY_BATCHES=str(folder))
        read[name] = [(folder / f"batches-{rank}").read_text().splitlines() for rank in (0, 1)]
    (rewind,) = events(tmp_path / "run" / "run", "rewind")
    assert (rewind["step"], rewind["position"]) == (4, 8)
    assert read["run"] == read["whole"], "thirteen batches one after the other, none read twice"
    checksums = [line.split()[1] for rank in read["whole"] for line in rank]
    assert len(set(checksums)) == 26


@each_engine
def test_a_loss_that_is_no_number_on_one_rank_stops_the_update_on_all(inputs, tmp_path, engine):
    run = tmp_path / "run"
    settings = QUIET | {"num_training_steps": 6, "save_every": 0} | ENGINES[engine]
    run_on(2, flags(inputs, run, **settings), FAULTY_NAN="3", FAULTY_RANK="1")
    (skipped,) = events(run, "skipped")
    assert skipped["step"] == 4
    lines = {x["step"]: x for x in metrics(run) if "loss" in x}
    assert lines[4]["grad_norm"] is None
    assert all(math.isfinite(lines[step]["loss"]) for step in (5, 6)), "its weights are whole"


@each_engine
def test_a_spike_is_left_out_by_all_ranks(inputs, tmp_path, engine):
    """On one rank's share of the batch, so that only their mean stands out; afterwards as if that loss had been no number."""
    settings = QUIET | {"num_training_steps": 40, "total_batch_size": 4, "save_every": 0}
    settings |= ENGINES[engine] | {"spike_sigma": 20, "spike_action": "skip"}
    after = []
    for fault in ("FAULTY_SPIKE", "FAULTY_NAN"):
        run = tmp_path / fault
        run_on(2, flags(inputs, run, **settings), FAULTY_RANK="1", **{fault: "37"})
        (event,) = events(run, "skipped")
        assert event["step"] == 38
        assert len(events(run, "spike")) == (fault == "FAULTY_SPIKE")
        after.append([losses(run)[step] for step in (37, 39, 40)])
    assert after[0] == after[1]


@pytest.mark.parametrize("engine", ["fsdp", "zero2"])
def test_a_full_disk_is_known_to_all_ranks_beside_training(inputs, tmp_path, small_disk, engine):
    run = small_disk / "run"
    settings = (
        QUIET
        | {"num_training_steps": 30, "save_every": 4, "keep_last": 1, "timeout": 60}
        | ENGINES[engine]
    )
    line = flags(inputs, run, async_save="yes", **settings)
    process = start(torchrun(2, FAULTY, *line), FAULTY_PAUSE="2 20", FAULTY_FOLDER=str(tmp_path))
    for rank in (0, 1):
        wait_until(pause_file(tmp_path, rank).exists, process)
    ballast = fill(small_disk)
    for rank in (0, 1):
        pause_file(tmp_path, rank).unlink()
    wait_until(lambda: "save_failed" in (run / "events.jsonl").read_text(), process)
    for rank in (0, 1):
        wait_until(pause_file(tmp_path, rank).exists, process)
    assert "was not saved" in heartbeat(run)["alarms"][0]
    ballast.unlink()
    for rank in (0, 1):
        pause_file(tmp_path, rank).unlink()
    code, output = end(process)
    assert code == 0, output
    assert "written beside training" in output
    assert events(run, "save_failed")[0]["step"] == 4
    assert heartbeat(run)["last_checkpoint"] == 30
    assert heartbeat(run)["alarms"] == []
