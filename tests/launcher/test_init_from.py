"""pretrain.py --init_from, as a user runs it: from a run, and beside a resume."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.tiny import flags


def test_a_run_starts_from_a_run(inputs: Path, bare: Any, tmp_path: Path, capsys: Any) -> None:
    """The first loss of the second run is where the first one ended; a resume does not start again."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert bare(flags(inputs, first, num_training_steps=12, lr=0.01)) == 0
    ended = json.loads((first / "summary.json").read_text())["final_eval_perplexity"]
    same: dict[str, Any] = {
        "init_from": first,
        "num_training_steps": 2,
        "warmup_steps": 0,
        "lr": 1e-12,
    }
    assert bare(flags(inputs, second, **same)) == 0
    assert f"starting from the weights of {first / 'step_12'}" in capsys.readouterr().out
    began = json.loads((second / "summary.json").read_text())["final_eval_perplexity"]
    assert began == pytest.approx(ended, rel=1e-6)
    assert json.loads((second / "config.json").read_text())["init_from"] == str(first)

    again = flags(inputs, second, **{**same, "num_training_steps": 3}, continue_from="auto")
    assert bare(again) == 0
    printed = capsys.readouterr().out
    assert "continuing from" in printed
    assert "starting from" not in printed

    third = tmp_path / "third"
    other = flags(inputs, third, **same, tokenizer_vocab=300)
    assert bare(other) == 0
    assert f"--tokenizer {first} is its own" in capsys.readouterr().out
    assert bare(flags(inputs, third, **same, continue_from=first)) == 2
    assert "brings its own weights; drop one of the two" in capsys.readouterr().err
