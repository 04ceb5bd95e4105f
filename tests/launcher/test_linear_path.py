"""--linear_path through the real command: said, stored, reused on resume, pinned."""

import json
import re
import shutil

import pytest

from tests.launcher.tiny import deepspeed, flags, launch, losses

SHORT = {"num_training_steps": 4, "save_every": 2, "eval_tokens": 200}


def stored(run, step):
    return json.loads((run / f"step_{step}" / "state.json").read_text())["linear_paths"]


def row(output):
    (text,) = re.findall(r"^linear paths +(.*)$", output, re.MULTILINE)
    return text


def back_to(run, step, last):
    shutil.rmtree(run / f"step_{last}")
    (run / "latest").write_text(f"step_{step}\n")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_auto_is_said_stored_cached_and_reused(bare, inputs, tmp_path, capsys, dropout):
    options = SHORT | {"lora_dropout": dropout, "cache_dir": tmp_path / "cache"}
    run = tmp_path / "run"
    assert bare(flags(inputs, run, **options)) == 0
    first = row(capsys.readouterr().out)
    assert sum(int(count) for count in re.findall(r"(\d+) (?:factorized|composed)", first)) == 14
    chosen = stored(run, 2)
    assert len(chosen) == 3
    assert all("128 tokens" in key for key in chosen)
    expected = losses(run)
    assert bare(flags(inputs, tmp_path / "again", **options)) == 0
    assert "of the shapes 0 timed" in row(capsys.readouterr().out)
    # Where the cache has learnt otherwise since, the checkpoint's choice is what trains on.
    cache = json.loads((tmp_path / "cache" / "linear_paths.json").read_text())
    for seconds in cache["seconds"].values():
        seconds["composed"], seconds["factorized"] = seconds["factorized"], seconds["composed"]
    (tmp_path / "cache" / "linear_paths.json").write_text(json.dumps(cache))
    back_to(run, 2, 4)
    assert bare(flags(inputs, run, continue_from="auto", **options)) == 0
    output = capsys.readouterr().out
    assert "3 as in the checkpoint" in row(output)
    assert "not bit-exact" not in output
    assert losses(run) == expected
    assert stored(run, 4) == chosen


def test_pinned_wins_over_the_checkpoint_with_one_line(bare, inputs, tmp_path, capsys):
    run = tmp_path / "run"
    assert bare(flags(inputs, run, linear_path="composed", **SHORT)) == 0
    assert row(capsys.readouterr().out) == "14 composed (pinned)"
    expected = losses(run)
    shutil.copytree(run, tmp_path / "copy")
    back_to(run, 2, 4)
    line = flags(inputs, run, linear_path="factorized", continue_from="auto", **SHORT)
    assert bare(line) == 0
    output = capsys.readouterr().out
    assert row(output) == "14 factorized, x A^T kept (pinned)"
    assert output.count("--linear_path factorized: 3 of 3 shapes of linears were composed") == 1
    assert losses(run) == pytest.approx(expected, abs=1e-4)
    # auto goes on with what the checkpoint was pinned to
    back_to(tmp_path / "copy", 2, 4)
    assert bare(flags(inputs, tmp_path / "copy", continue_from="auto", **SHORT)) == 0
    assert row(capsys.readouterr().out).startswith("14 composed (of the shapes 0 timed")
    assert losses(tmp_path / "copy") == expected


def test_transformers_model_has_the_same_linears(bare, inputs, tmp_path, capsys):
    line = flags(inputs, tmp_path / "run", **(SHORT | {"linear_path": "factorized"}))
    assert bare([*line, "--use_hf_model"]) == 0
    assert row(capsys.readouterr().out) == "14 factorized, x A^T kept (pinned)"


def test_two_ranks_of_zero_take_the_first_ones_choice(inputs, tmp_path):
    run = tmp_path / "run"
    options = SHORT | {"num_training_steps": 2, "warmup_steps": 1, "cache_dir": tmp_path / "cache"}
    done = launch(deepspeed(2, "--ds_config", "ds_configs/zero3.json", *flags(inputs, run, **options)))  # fmt: skip
    assert done.returncode == 0, done.stderr
    row(done.stdout)
    assert len(stored(run, 2)) == 3
    assert len(losses(run)) == 2


def test_other_methods_have_no_path(bare, inputs, tmp_path, capsys):
    assert bare(flags(inputs, tmp_path / "run", method="full", **SHORT)) == 0
    assert "linear paths" not in capsys.readouterr().out
    line = flags(inputs, tmp_path / "other", method="full", linear_path="composed", **SHORT)
    assert bare(line) == 2
    assert "--linear_path composed: --method full" in capsys.readouterr().err
