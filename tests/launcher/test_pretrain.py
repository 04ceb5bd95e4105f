"""The main job through its real commands: deepspeed and torchrun with two ranks, and a bare process."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.launcher.tiny import deepspeed, flags, launch, losses, metrics

TRAINING_KEYS = {
    "step",
    "loss",
    "lr",
    "grad_norm",
    "tokens_seen",
    "tokens_per_second",
    "peak_memory_bytes",
    "time",
    "seconds",
    "seconds_data",
    "seconds_forward",
    "seconds_backward",
    "seconds_optimizer",
    "goodput",
}
SAMPLED_KEYS = {"seconds_communication", "slowest_rank", "slowest_seconds", "seconds_save"}


@pytest.fixture(scope="module")
def zero_run(inputs, tmp_path_factory):
    """deepspeed --num_gpus 2 under ZeRO-2: the run the other engines are compared with."""
    folder = tmp_path_factory.mktemp("zero") / "run"
    settings = flags(inputs, folder, tracker="tensorboard")
    done = launch(deepspeed(2, "--ds_config", "ds_configs/zero2.json", *settings))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_what_a_user_sees(zero_run):
    folder, output = zero_run
    for row in ("method", "parameters", "optimizer", "engine", "back ends", "training", "memory"):
        assert len(re.findall(rf"^{row} ", output, re.MULTILINE)) == 1, f"{row}: not exactly once"
    assert "zero-2 on 2 x cpu, float32" in output
    assert "torch.optim.adamw.AdamW" in output
    assert "final perplexity" in output
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "summary.json", "loss.png", "sample.txt"} <= names
    assert {
        "step_3",
        "step_6",
        "latest",
        "tensorboard",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= names
    assert (folder / "latest").read_text().strip() == "step_6"


def test_records(zero_run):
    folder, _ = zero_run
    lines = metrics(folder)
    training = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    assert all(set(line) - SAMPLED_KEYS == TRAINING_KEYS for line in training)
    assert training[1]["seconds_communication"] > 0, "the second update of a segment is sampled"
    assert "seconds_save" in training[3]
    for line in training:
        parts = sum(
            line[f"seconds_{phase}"] for phase in ("data", "forward", "backward", "optimizer")
        )
        assert 0.5 * line["seconds"] < parts <= line["seconds"]
    assert training[0]["loss"] == pytest.approx(math.log(512), abs=0.3)
    assert training[-1]["loss"] < training[0]["loss"]
    assert [line["tokens_seen"] for line in training] == [8 * 64 * n for n in range(1, 7)]
    assert [line["step"] for line in held_out] == [3, 6]
    assert all(line["eval_tokens"] == 1000 for line in held_out)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["final_eval_perplexity"] == pytest.approx(held_out[-1]["eval_perplexity"])
    assert set(summary["parameters"]) == {"total", "low_rank", "sparse", "dense", "indices_bytes"}
    assert summary["peak_memory_bytes"] > 1e8
    resolved = json.loads((folder / "config.json").read_text())
    assert resolved["method"]["rank"] == 8
    assert resolved["engine"]["stage"] == 2


def test_fsdp_under_torchrun_continues_the_zero_run(zero_run, inputs, tmp_path):
    """Saved by ZeRO-2 on 2 ranks, continued by FSDP2 on 2: the same losses, the same evaluation."""
    source, _ = zero_run
    command = ["torchrun", "--standalone", "--nproc_per_node", "2", "launcher/pretrain.py"]
    command += flags(inputs, tmp_path / "run", engine="fsdp", continue_from=source / "step_3")
    done = launch(command)
    assert done.returncode == 0, done.stderr
    assert "fsdp on 2 x cpu" in done.stdout
    expected, got = losses(source), losses(tmp_path / "run")
    assert sorted(got) == [4, 5, 6]
    for step, loss in got.items():
        assert loss == pytest.approx(expected[step], abs=1e-4)
    assert metrics(tmp_path / "run")[-1]["eval_loss"] == pytest.approx(
        metrics(source)[-1]["eval_loss"], abs=1e-4
    )


def test_bare_process_continues_bit_exactly(bare, inputs, tmp_path, zero_run):
    """One process: the uninterrupted run equals ZeRO-2's, and the interrupted one equals it to the bit."""
    whole = tmp_path / "whole"
    assert bare(flags(inputs, whole)) == 0
    for step, loss in losses(zero_run[0]).items():
        assert losses(whole)[step] == pytest.approx(loss, abs=1e-4)
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "step_6")
    (part / "latest").unlink()
    assert bare(flags(inputs, part, continue_from="auto")) == 0
    assert losses(part) == losses(whole)
    first, second = (
        [load_file(path) for path in sorted((run / "step_6").glob("*.safetensors"))]
        for run in (whole, part)
    )
    assert [list(tensors) for tensors in first] == [list(tensors) for tensors in second]
    for mine, theirs in zip(first, second, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    held_out = [
        [(line["step"], line["eval_loss"]) for line in metrics(run) if "eval_loss" in line]
        for run in (whole, part)
    ]
    assert held_out[0] == held_out[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "full"},
        {"method": "low_rank", "lora_dropout": 0.1},
        {"support": "uniform", "optimizer": "adafactor", "beta1": 0.9},
        {"support": "block", "block_size": 4, "dtype": "bfloat16", "master_weights": "none"},
        {"dtype": "bfloat16", "grad_sync": "last", "activation_checkpointing": "block"},
        {
            "optimizer": "sgd",
            "beta1": 0.9,
            "scheduler": "cosine_restarts",
            "cycle_length": 3,
            "warmup_steps": 1,
        },
        {"pack": "padded", "loss_average": "micro_batches", "eval_mode": "reference", "workers": 2},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_variants_train_and_resume(bare, inputs, tmp_path, changes):
    short = {
        "eval_tokens": 200,
        "save_every": 2,
        "num_training_steps": 4 if "cycle_length" not in changes else 6,
    }
    run = tmp_path / "run"
    assert bare(flags(inputs, run, **(short | changes))) == 0
    expected = losses(run)
    assert all(math.isfinite(loss) for loss in expected.values())
    shutil.rmtree(run / f"step_{short['num_training_steps']}")
    (run / "latest").write_text("step_2\n")
    assert bare(flags(inputs, run, continue_from=run, **(short | changes))) == 0
    assert losses(run) == expected


def test_switches(bare, inputs, tmp_path):
    """--train_scaling, --use_hf_model and --single_gpu are flags without values."""
    line = flags(inputs, tmp_path / "run", num_training_steps=2, warmup_steps=1)
    assert bare([*line, "--train_scaling", "--use_hf_model", "--single_gpu"]) == 0
    resolved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert resolved["method"]["train_scaling"]
    assert resolved["use_hf_model"]


def test_published_command_of_the_reference(bare, inputs, tmp_path):
    """The reference's usage with the script's path changed and the text at hand: 43.53M parameters."""
    published = (
        "--model_config configs/llama_60m.json --lr 0.003 --peft_model sltrain --optimizer adamw --rank 128 "
        "--sp_ratio 0.03 --batch_size 4 --total_batch_size 8 --num_training_steps 2 --warmup_steps 1 "
        "--weight_decay 0 --dtype bfloat16 --eval_every 10 --lora_alpha 32"
    ).split()
    local = (
        f"--corpus {inputs / 'text.txt'} --cache_dir {inputs / 'cache'} --max_length 16 --workers 0"
    )
    run = tmp_path / "run"
    assert (
        bare(
            [
                *published,
                *local.split(),
                "--eval_tokens",
                "32",
                "--tracker",
                "none",
                "--save_dir",
                str(run),
            ]
        )
        == 0
    )
    parameters = json.loads((run / "summary.json").read_text())["parameters"]
    assert round(parameters["total"] / 1e6, 2) == 43.53
