"""export.py and import_weights.py as a user runs them, on a run that really trained: text in, text out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import export, import_weights
from sltrain_dist.tools.weights import load_model, open_pretrained
from tests.launcher.tiny import flags, launch

transformers = pytest.importorskip("transformers")
TEXT = "def parse_args(self, args=None):\n    return self.argument"


@pytest.fixture(scope="module")
def run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six updates whose cache is gone: all that an export needs lies in its folder."""
    folder = tmp_path_factory.mktemp("run")
    cache = folder / "cache"
    command = flags(inputs, folder / "run", cache_dir=cache, train_scaling=None, lr=0.02)
    done = launch(["python", "launcher/pretrain.py", *command, "--train_scaling"])
    assert done.returncode == 0, done.stderr
    shutil.rmtree(cache)
    return folder / "run"


@torch.no_grad()
def test_transformers_continues_a_text_as_we_do(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    done = launch(["python", "launcher/export.py", "--to", "hf", str(run), "--output", str(out)])
    assert done.returncode == 0, done.stderr
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert f"parameters  {sum(p.numel() for p in theirs.parameters()):,}\n" in done.stdout
    assert "density     0.06" in done.stdout
    assert str(out) in done.stdout

    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ours = open_pretrained(run, "--model")
    assert ours.tokenizer is not None
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == ours.tokenizer.encode_batch([TEXT])[0]
    assert theirs.generation_config.eos_token_id == ours.tokenizer.eos_id
    prompt = torch.tensor([ids])
    text = theirs.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)
    model = load_model(ours)
    for _ in range(24):
        prompt = torch.cat((prompt, model(prompt)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(text, prompt)
    assert tokenizer.decode(text[0]) == ours.tokenizer.decode(prompt[0].tolist())


@torch.no_grad()
def test_there_and_back(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """run -> hf -> factored (dense) -> hf is the same to the byte; sizes shrink where they should."""
    hf, dense, again, small = (tmp_path / name for name in ("hf", "dense", "again", "small"))
    for command in ((run, "hf", hf), (run, "factored", small)):
        source, kind, output = (str(part) for part in command)
        assert export.main([source, "--to", kind, "--output", output]) == 0
    assert import_weights.main([str(hf), "--output", str(dense)]) == 0
    assert export.main([str(dense), "--to", "hf", "--output", str(again)]) == 0
    names = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json")
    for name in names:
        assert (hf / name).read_bytes() == (again / name).read_bytes(), name
    weights = [(folder / "model.safetensors").stat().st_size for folder in (small, hf)]
    assert weights[0] < 0.9 * weights[1]
    assert json.loads((small / "model.json").read_text())["intermediate_size"] == 172
    capsys.readouterr()


def test_mistakes_are_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    cases: tuple[tuple[list[Any], str], ...] = (
        ([run, "--to", "hf", "--output", taken], "--output"),
        ([tmp_path / "none", "--to", "hf", "--output", tmp_path / "o"], "no such folder"),
        ([run, "--to", "onnx", "--output", tmp_path / "o"], "--to"),
        ([run, "--to", "hf"], "--output"),
        ([run, "--to", "hf", "--output", tmp_path / "o", "--dtype", "float16"], "--dtype"),
        ([run, "--to", "hf", "--output", "/proc/none/out"], "cannot be written"),
    )
    for command, message in cases:
        assert export.main([str(part) for part in command]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        assert message in printed.err
        assert not printed.out
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_factored_model_is_trained_on(
    run: Path, inputs: Path, bare: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An HF LLaMA becomes SLTrain, and a run starts from it with the flags the errors named."""
    hf, factored, second = tmp_path / "hf", tmp_path / "factored", tmp_path / "second"
    assert export.main([str(run), "--to", "hf", "--output", str(hf)]) == 0
    shape = "--method sltrain --rank 16 --sp_ratio 0.0625 --lora_alpha 16".split()
    assert import_weights.main([str(hf), "--output", str(factored), *shape]) == 0
    command = flags(
        inputs, second, init_from=factored, model=factored / "model.json", rank=16, lora_alpha=16.0,
        num_training_steps=2, warmup_steps=1, tokenizer=factored,
    )  # fmt: skip
    assert bare(command) == 0
    printed = capsys.readouterr()
    assert f"starting from the weights of {factored}" in printed.out
    assert "another tokenizer" not in printed.out
    wrong = flags(inputs, tmp_path / "third", init_from=factored, model=factored / "model.json")
    assert bare(wrong) == 2
    assert "--rank 16, this run has --rank 8; give --rank 16" in capsys.readouterr().err
