"""Who may write in a run folder, and records that survive a resume and a full disk."""

import json
import os
from dataclasses import replace

import pytest

from sltrain_dist.train.run_folder import Records, choose_folder, claim_folder
from sltrain_dist.train.settings import resolve
from sltrain_dist.utils.errors import UserError


def config(**changes):
    return replace(resolve([], 1), **changes)


def test_choice_of_folder(tmp_path):
    assert str(choose_folder(config(save_dir="runs/x"))) == "runs/x"
    assert choose_folder(config()).name.startswith("llama_demo-sltrain-2")
    run = tmp_path / "run"
    (run / "step_5").mkdir(parents=True)
    assert choose_folder(config(continue_from=str(run))) == run
    assert choose_folder(config(continue_from=str(run / "step_5"))) == run
    with pytest.raises(UserError, match="--continue_from auto"):
        choose_folder(config(continue_from="auto"))


def test_another_run_is_not_overwritten(tmp_path):
    claim_folder(tmp_path / "new", None)
    (tmp_path / "new" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds another run"):
        claim_folder(tmp_path / "new", None)
    with pytest.raises(UserError, match="holds another run"):
        claim_folder(tmp_path / "new", str(tmp_path / "elsewhere"))
    claim_folder(tmp_path / "new", "auto")
    claim_folder(tmp_path / "new", str(tmp_path / "new" / "step_3"))


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "run", tmp_path / "file"):
        with pytest.raises(UserError, match=r"--save_dir .*: not writable"):
            claim_folder(folder, None)


def test_metrics_continue_without_gap_or_repetition(tmp_path):
    records = Records(tmp_path, active=True)
    for step in (1, 2):
        records.metrics({"step": step, "loss": 1.5})
    position = records.position()
    records.metrics({"step": 3, "loss": float("nan")})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[2] == {"step": 3, "loss": None}
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    again = Records(tmp_path, active=True)
    again.rewind(position)
    again.metrics({"step": 3, "loss": 1.25})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_other_ranks_write_nothing(tmp_path):
    records = Records(tmp_path, active=False)
    records.metrics({"step": 1})
    records.summary({})
    assert records.picture() is None
    assert not os.listdir(tmp_path)


def test_full_disk_is_reported_once(tmp_path, capsys):
    records = Records(tmp_path / "missing", active=True)
    records.metrics({"step": 1})
    records.metrics({"step": 2})
    assert capsys.readouterr().err.count("training goes on") == 1


def test_picture(tmp_path):
    records = Records(tmp_path, active=True)
    for step in range(1, 30):
        records.metrics({"step": step, "loss": 9 - step / 10, "grad_norm": 1.0, "lr": 1e-3})
    records.metrics({"step": 29, "eval_loss": 6.0, "eval_perplexity": 403.4, "eval_tokens": 9})
    assert records.picture() is None
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
