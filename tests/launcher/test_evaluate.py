"""launcher/evaluate.py gives a run's final loss again, on one process and under torchrun."""

import json
import shutil

import pytest

from launcher import evaluate
from tests.launcher.tiny import flags, launch

TORCHRUN = ["torchrun", "--standalone", "--nproc_per_node", "2"]


def summary(run):
    return json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize("weights", [[], ["--merged"], ["--factored"]])
def test_the_final_loss_again(bare, trained, tmp_path, capsys, weights):
    target = tmp_path / "result.json"
    assert evaluate.main([str(trained), *weights, "--json", str(target)]) == 0
    result, expected = json.loads(target.read_text()), summary(trained)
    assert result["loss"] == pytest.approx(expected["final_eval_loss"], rel=1e-6)
    assert result["perplexity"] == pytest.approx(expected["final_eval_perplexity"], rel=1e-5)
    assert result["tokens"] == expected["eval_tokens"]
    printed = capsys.readouterr().out
    assert f"{expected['final_eval_loss']:.6f}" in printed
    assert f"{expected['final_eval_perplexity']:.2f}" in printed


def test_a_run_of_two_ranks_in_reference_mode(bare, inputs, tmp_path, capsys):
    """Its batch means depend on how the ranks dealt the samples: one rank and two give its number."""
    run = tmp_path / "run"
    line = flags(
        inputs, run, eval_mode="reference", dtype="bfloat16", num_training_steps=3, pack="padded",
        batch_size=4, eval_every=0, save_every=0,
    )  # fmt: skip
    done = launch([*TORCHRUN, "launcher/pretrain.py", *line])
    assert done.returncode == 0, done.stderr
    expected = summary(run)["final_eval_loss"]
    assert evaluate.main([str(run), "--json", str(tmp_path / "one.json")]) == 0
    one = json.loads((tmp_path / "one.json").read_text())
    assert one["dtype"] == "bfloat16"
    assert one["loss"] == pytest.approx(expected, rel=1e-6)
    capsys.readouterr()
    two = launch(
        [*TORCHRUN, "launcher/evaluate.py", str(run), "--json", str(tmp_path / "two.json")]
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("perplexity") == 1
    assert json.loads((tmp_path / "two.json").read_text())["loss"] == pytest.approx(
        one["loss"], rel=1e-6
    )
    assert evaluate.main([str(run), "--eval_mode", "exact"]) == 0
    assert f"{one['loss']:.6f}" not in capsys.readouterr().out


def test_the_tokenizer_is_the_models_own(bare, trained, inputs, tmp_path):
    """Without the cache that the run trained its tokenizer into: nothing is trained again."""
    cache, target = tmp_path / "cache", tmp_path / "result.json"
    line = [str(trained), "--cache_dir", str(cache), "--json", str(target)]
    assert evaluate.main(line) == 0
    assert [path.name.split("-")[0] for path in cache.iterdir() if path.is_dir()] == ["index"]
    again = json.loads(target.read_text())["loss"]
    assert again == pytest.approx(summary(trained)["final_eval_loss"], rel=1e-6)
    other = tmp_path / "other.txt"
    other.write_text((inputs / "text.txt").read_text()[:20_000].upper())
    assert evaluate.main([*line, "--corpus", str(other), "--eval_tokens", "1K"]) == 0
    assert json.loads(target.read_text())["loss"] != pytest.approx(again, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: MODEL"),
        (["/no/such"], "MODEL /no/such: no such folder"),
        (["RUN", "--corpus", "/no/such"], "--corpus /no/such"),
        (["RUN", "--max_length", "129"], "the model has 128 positions"),
        (["RUN", "--eval_tokens", "-5"], "--eval_tokens -5"),
        (["RUN", "--eval_tokens", "many"], "--eval_tokens"),
        (["RUN", "--batch_size", "0"], "--batch_size 0"),
        (["RUN", "--pack", "tight"], "--pack"),
        (["RUN", "--split", "train"], "--split"),
        (["RUN", "--dtype", "half"], "--dtype half"),
        (["RUN", "--device", "tpu"], "--device"),
        (["RUN", "--merged", "--factored"], "--merged"),
        (["RUN", "--json", "/no/such/folder/file"], "/no/such/folder is no folder to write in"),
        (["RUN", "--json", "/"], "--json /: is a folder"),
    ],
)
def test_mistakes(bare, trained, capsys, arguments, words):
    assert evaluate.main([str(trained) if text == "RUN" else text for text in arguments]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("error: ")
    assert words in message


def test_a_batch_larger_than_the_text_costs_nothing(bare, trained, tmp_path):
    target = tmp_path / "result.json"
    assert evaluate.main([str(trained), "--batch_size", "100000000", "--json", str(target)]) == 0
    loss = json.loads(target.read_text())["loss"]
    assert loss == pytest.approx(summary(trained)["final_eval_loss"], rel=1e-6)


def test_a_damaged_checkpoint_under_torchrun_is_one_line(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    victim = next((run / "step_6").glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-8])
    done = launch([*TORCHRUN, "launcher/evaluate.py", str(run)])
    assert done.returncode != 0
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, done.stderr
    assert victim.name in messages[0]
