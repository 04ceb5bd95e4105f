"""The DeepSpeed JSON is filled from the flags, and contradictions end the run before anything is built."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sltrain_dist.config import EngineConfig, OptimizerConfig
from sltrain_dist.parallel.ds_config import load_ds_config, resolve_ds_config, stage_of
from sltrain_dist.utils.errors import UserError

FILES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
ENGINE = EngineConfig(engine="zero", batch_size=4, gradient_accumulation=3)
HALF = EngineConfig(engine="zero", batch_size=4, gradient_accumulation=3, dtype="bfloat16")
OPTIMIZER = OptimizerConfig(lr=1e-3, grad_clipping=0.5)


def _resolve(
    config: dict[str, Any] | None, engine: EngineConfig = ENGINE, dp_size: int = 2
) -> dict[str, Any]:
    return resolve_ds_config(config, engine, OPTIMIZER, dp_size)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("engine", [ENGINE, HALF], ids=["float32", "bfloat16"])
def test_every_shipped_file_resolves_and_deepspeed_itself_parses_it(
    path: Path, engine: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path.stem == "zero0" and engine is HALF:
        with pytest.raises(UserError, match="adds gradients up in bfloat16"):
            _resolve(load_ds_config(path), engine)
        return
    resolved = _resolve(load_ds_config(path), engine, dp_size=1)
    if "DS_ACCELERATOR" not in os.environ:
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    deepspeed = pytest.importorskip("deepspeed")
    parsed = deepspeed.DeepSpeedConfig(resolved)
    assert parsed.train_batch_size == 12
    assert parsed.gradient_clipping == 0.5
    assert parsed.zero_optimization_stage == int(path.stem[4])
    assert parsed.bfloat16_config.enabled == (engine is HALF)
    assert parsed.grad_accum_dtype == "fp32"


def test_absent_and_automatic_values_come_from_the_flags() -> None:
    keys = "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps"
    automatic = dict.fromkeys([*keys.split(), "gradient_clipping", "steps_per_print"], "auto")
    resolved = _resolve(
        automatic | {"zero_optimization": {"stage": "auto"}, "bf16": {"enabled": "auto"}}
    )
    assert resolved == _resolve(None)
    assert resolved["train_batch_size"] == 24
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["gradient_accumulation_steps"] == 3
    assert resolved["gradient_clipping"] == 0.5
    assert resolved["bf16"]["enabled"] is False
    assert stage_of(resolved) == ENGINE.stage
    assert "auto" not in json.dumps(resolved)


def test_the_users_dictionary_is_left_alone_and_matching_values_are_no_contradiction() -> None:
    config = {
        "train_batch_size": 24,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 1, "overlap_comm": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": "auto"},
        },
    }
    before = json.dumps(config)
    resolved = _resolve(config)
    assert json.dumps(config) == before
    assert "optimizer" not in resolved  # compared; the live one is built by optim/table.py
    assert stage_of(resolved) == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"train_batch_size": 7}, ("train_batch_size", "7", "--total_batch_size", "24")),
        ({"train_micro_batch_size_per_gpu": 8}, ("train_micro_batch_size_per_gpu", "--batch_size")),
        ({"gradient_accumulation_steps": 1}, ("gradient_accumulation_steps", "--gradient_accumul")),
        ({"gradient_clipping": 1.0}, ("gradient_clipping", "--grad_clipping", "0.5")),
        ({"bf16": {"enabled": True}}, ("bf16.enabled", "--dtype float32")),
        ({"fp16": {"enabled": True}}, ("fp16.enabled", "--dtype bfloat16")),
        ({"scheduler": {"type": "WarmupLR"}}, ("scheduler", "--scheduler")),
        ({"optimizer": {"type": "Lamb"}}, ("optimizer.type", "lamb", "--optimizer")),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}, ("optimizer.params.lr", "--lr")),
        (
            {"optimizer": {"type": "AdamW", "params": {"rho": 1}}},
            ("optimizer.params.rho", "delete"),
        ),
        ({"zero_optimization": {"stage": 4}}, ("stage", "4", "0, 1, 2 or 3")),
        ({"zero_optimization": {"stage": True}}, ("stage", "0, 1, 2 or 3")),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            ("offload_param",),
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ("cpu",)),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, ("quantized",)),
        ({"moe": {"enabled": True}}, ("moe", "experts")),
        ({"gradient_cliping": 1.0}, ("gradient_cliping", "unknown")),
        ({"bf16": True}, ("bf16", "object")),
        ({"log_level": "auto"}, ("log_level", "auto")),
    ],
)
def test_contradictions_and_unsupported_blocks_are_user_errors(
    config: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as raised:
        _resolve(config)
    message = str(raised.value)
    assert "--" in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_bfloat16_accumulates_and_reduces_in_float32() -> None:
    resolved = _resolve({"zero_optimization": {"stage": 2}}, HALF)
    assert resolved["bf16"]["enabled"] is True
    assert resolved["data_types"]["grad_accum_dtype"] == "fp32"
    assert resolved["communication_data_type"] == "fp32"
    with pytest.raises(UserError, match=r"data_types\.grad_accum_dtype"):
        _resolve(
            {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}}, HALF
        )


def test_the_stage_can_be_asked_before_anything_is_resolved() -> None:
    assert stage_of({}) == 0
    assert stage_of({"zero_optimization": {"stage": "auto"}}) == EngineConfig.stage
    assert stage_of({"zero_optimization": {"stage": 3}}) == 3
    for bad in ({"stage": "three"}, {"stage": None}, 2):
        with pytest.raises(UserError, match="zero_optimization"):
            stage_of({"zero_optimization": bad})


@pytest.mark.parametrize("stage", [2, 3])
def test_reducing_once_an_update_is_refused_where_gradients_are_partitioned(stage: int) -> None:
    engine = dataclasses.replace(ENGINE, grad_sync="last")
    with pytest.raises(UserError, match=f"--grad_sync last: ZeRO stage {stage}"):
        _resolve({"zero_optimization": {"stage": stage}}, engine)
    _resolve({"zero_optimization": {"stage": 1}}, engine)


@pytest.mark.parametrize("stage", [0, 1])
def test_pure_bfloat16_is_refused_where_deepspeed_cannot(stage: int) -> None:
    pure = EngineConfig(engine="zero", dtype="bfloat16", master_weights=False)
    with pytest.raises(
        UserError, match="use --master_weights fp32, --engine fsdp, or stage 2 or 3"
    ):
        _resolve({"zero_optimization": {"stage": stage}}, pure)
    resolved = _resolve({"zero_optimization": {"stage": 2}}, pure)
    assert resolved["bf16"]["bf16_master_weights_and_grads"] is True


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a readable JSON file"),
        ("[]", "must hold one JSON object, not list"),
        ('{"bf16": {}, "bf16": {}}', "twice"),
        (b"\xff\xfe\x00", "not a readable JSON file"),
    ],
)
def test_malformed_files_are_user_errors(tmp_path: Path, text: str | bytes, words: str) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words):
        load_ds_config(path)
    with pytest.raises(UserError, match="no such file"):
        load_ds_config(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("bf16", True, "an object"),
        ("bf16", None, "an object"),
        ("optimizer", "adam", "an object"),
        ("optimizer.params", None, "an object"),
        ("optimizer.type", 3, "a string"),
        ("optimizer.params.betas", 0.9, "a list of two numbers in [0, 1)"),
        ("optimizer.params.betas", [0.9], "a list of two numbers in [0, 1)"),
        ("optimizer.params.lr", "1e-3", "a positive number"),
        ("optimizer.params.lr", float("nan"), "a positive number"),
        ("optimizer.params.weight_decay", -1, "a number that is not negative"),
        ("train_batch_size", "64", "a positive integer"),
        ("train_batch_size", 0, "a positive integer"),
        ("train_batch_size", True, "a positive integer"),
        ("train_micro_batch_size_per_gpu", 2.5, "a positive integer"),
        ("gradient_accumulation_steps", -2, "a positive integer"),
        ("gradient_clipping", "1.0", "a number that is not negative"),
        ("gradient_clipping", [1], "a number that is not negative"),
        ("zero_optimization", [], "an object"),
        ("zero_optimization", None, "an object"),
        ("zero_optimization.stage", "2", "0, 1, 2 or 3"),
        ("zero_optimization.stage", 4, "0, 1, 2 or 3"),
        ("zero_optimization.stage", True, "0, 1, 2 or 3"),
        ("zero_optimization.reduce_bucket_size", "big", "a whole number"),
        ("zero_optimization.offload_param", "cpu", "an object or null"),
        ("zero_optimization.offload_param.device", None, "a string"),
        ("bf16.enabled", "yes", "true or false"),
        ("fp16.enabled", 1, "true or false"),
        ("data_types.grad_accum_dtype", 32, "a string"),
    ],
)
def test_wrong_types_are_named_with_file_key_value_and_what_is_expected(
    tmp_path: Path, key: str, value: Any, words: str
) -> None:
    path = tmp_path / "ds.json"
    content = value
    for part in reversed(key.split(".")):
        content = {part: content}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as raised:
        load_ds_config(path)
    expected = f'--ds_config {path}: "{key}" is {json.dumps(value)}; it must be {words}'
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_sizes_as_deepspeeds_examples_write_them_and_null_where_it_means_none(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ds.json"
    zero = {"stage": 3, "reduce_bucket_size": 5e8, "offload_param": None, "overlap_comm": "auto"}
    content = {"zero_optimization": zero, "gradient_clipping": 0, "steps_per_print": None}
    path.write_text(json.dumps(content))
    assert load_ds_config(path) == content
