"""Checkpoints of another model, method, support, optimizer or layout: refused by name, or said."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sltrain_dist.parallel.mesh import Mesh, close, initialise
from sltrain_dist.train.checkpoint import load
from sltrain_dist.utils.errors import UserError
from tests.train.fake_engine import FakeEngine, make_config, write


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield initialise(device="cpu")
    close()


def other_engine(mesh: Mesh, change: str) -> FakeEngine:
    engine = FakeEngine(mesh, 0, support=1 if change == "support" else -5)
    if change == "shape":
        engine.replace("model.layers.0.q_proj.b", (5, 4), torch.float32)
    elif change == "missing":
        del engine.tensors["model.layers.0.q_proj.b"]
    elif change == "extra":
        engine.replace("model.layers.1.q_proj.b", (5, 2), torch.float32)
    elif change == "dtype":
        engine.replace("optimizer.codes.layers.0.q_proj.b", (10,), torch.int32)
    elif change == "optimizer":
        engine.replace("optimizer.exp_avg_sq.layers.0.q_proj.b", (5, 2), torch.float32)
    return engine


REFUSALS = {
    "shape": r"q_proj.b is \[5, 2\] in the checkpoint, \[5, 4\] in this run",
    "missing": "the checkpoint has model.layers.0.q_proj.b, this run has not",
    "extra": "this run has model.layers.1.q_proj.b, it has not",
    "dtype": "codes.layers.0.q_proj.b is uint8 in the checkpoint, int32 in this run",
    "optimizer": "of another optimizer: this run has optimizer.exp_avg_sq",
    "support": "of another support: hash fffffffffffffffb, in this run 0000000000000001",
}


@pytest.mark.parametrize("change", REFUSALS)
def test_other_state_is_refused_before_loading(mesh: Mesh, tmp_path: Path, change: str) -> None:
    write(mesh, tmp_path, 1)
    engine = other_engine(mesh, change)
    before = {name: tensor.to_local().clone() for name, tensor in engine.tensors.items()}
    with pytest.raises(UserError, match=REFUSALS[change]) as error:
        load(tmp_path / "step_1", engine, make_config(str(tmp_path)))
    assert "\n" not in str(error.value)
    assert not engine.loaded
    assert all(torch.equal(before[name], engine.tensors[name].to_local()) for name in before)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"method": "full"}, "--method sltrain, this run has --method full"),
        ({"rank": 4}, "--rank 2, this run has --rank 4"),
        ({"density": 0.05}, "--sp_ratio 0.03, this run has --sp_ratio 0.05"),
        ({"alpha": 8.0}, "--lora_alpha 32.0"),
        ({"support": "uniform"}, "--support fan_in"),
        ({"rope_theta": 5.0}, "rope_theta is 10000.0, in this run 5.0"),
        ({"name": "renamed"}, None),
        ({"dropout": 0.1}, None),
    ],
)
def test_other_configuration(
    mesh: Mesh, tmp_path: Path, changes: dict[str, object], complaint: str | None
) -> None:
    write(mesh, tmp_path, 1)
    engine = FakeEngine(mesh, 0)
    config = make_config(str(tmp_path), **changes)
    if complaint is None:
        load(tmp_path / "step_1", engine, config)
        assert engine.holds(1)
    else:
        with pytest.raises(UserError, match=complaint):
            load(tmp_path / "step_1", engine, config)
        assert not engine.loaded


def test_optimizer_with_the_same_tensors(mesh: Mesh, tmp_path: Path) -> None:
    """adam and adamw keep the same states; only the name tells them apart."""
    write(mesh, tmp_path, 1)
    engine, config = FakeEngine(mesh, 0), make_config(str(tmp_path))
    other = replace(config, optimizer=replace(config.optimizer, name="adam"))
    with pytest.raises(
        UserError, match="--optimizer adamw, this run has --optimizer adam; give --optimizer adamw"
    ) as error:
        load(tmp_path / "step_1", engine, other)
    assert "\n" not in str(error.value)
    assert not engine.loaded


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"total_batch_size": 32}, "--total_batch_size 16, this run has --total_batch_size 32"),
        ({"sequence_length": 512}, "--max_length 256, this run has --max_length 512"),
        ({"pack": "padded"}, "--pack packed, this run has --pack padded; give --pack packed"),
        ({"seed": 7}, "--seed 42, this run has --seed 7"),
        ({"vocab_size": 100}, "--tokenizer_vocab 8192, this run has --tokenizer_vocab 100"),
        ({"vocab_size": 100, "tokenizer": "t5-base"}, None),
        ({"cache_dir": "elsewhere", "workers": 3, "eval_tokens": 5}, None),
    ],
)
def test_other_order_of_samples(
    mesh: Mesh, tmp_path: Path, changes: dict[str, object], complaint: str | None
) -> None:
    """Each by its own flag; which text it is, data.entry compares."""
    write(mesh, tmp_path, 1)
    engine, config = FakeEngine(mesh, 0), make_config(str(tmp_path))
    in_run = {name: value for name, value in changes.items() if hasattr(config, name)}
    in_data = {name: value for name, value in changes.items() if name not in in_run}
    other = replace(config, data=replace(config.data, **in_data), **in_run)
    if complaint is None:
        load(tmp_path / "step_1", engine, other)
        assert engine.holds(1)
    else:
        with pytest.raises(UserError, match=complaint) as error:
            load(tmp_path / "step_1", engine, other)
        assert "\n" not in str(error.value)
        assert not engine.loaded


def test_what_may_change_is_said(mesh: Mesh, tmp_path: Path) -> None:
    write(mesh, tmp_path, 1)
    config = make_config(str(tmp_path))
    other = replace(config, optimizer=replace(config.optimizer, lr=0.5))
    resumed = load(tmp_path / "step_1", FakeEngine(mesh, 0), other)
    assert resumed.messages == ("changed since the checkpoint: --lr 0.003 -> 0.5",)
    assert not resumed.exact


def test_weights_change_precision_with_a_message(mesh: Mesh, tmp_path: Path) -> None:
    """fp32 master weights into a pure-bf16 run: rounded as ``.to`` rounds, said, and not called exact."""
    write(mesh, tmp_path, 1)
    engine = FakeEngine(mesh, 0)
    engine.replace("model.embed_tokens.weight", (7, 3), torch.bfloat16)
    resumed = load(tmp_path / "step_1", engine, make_config(str(tmp_path)))
    (message,) = resumed.messages
    assert "1 tensors are converted from float32 to bfloat16" in message
    assert not resumed.exact
    expected = FakeEngine(mesh, 1).tensors["model.embed_tokens.weight"].to_local().bfloat16()
    assert torch.equal(engine.tensors["model.embed_tokens.weight"].to_local(), expected)


def test_other_engine_is_not_exact(mesh: Mesh, tmp_path: Path) -> None:
    write(mesh, tmp_path, 1)
    engine = FakeEngine(mesh, 0, name="zero")
    state = torch.get_rng_state()
    resumed = load(tmp_path / "step_1", engine, make_config(str(tmp_path)))
    assert engine.holds(1)
    assert not resumed.exact
    assert "1 ranks of engine fsdp, resumed by 1 of zero" in resumed.messages[0]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("replicate", 2, r"fsdp \(replicate 1\), resumed by 1 of fsdp \(replicate 2\): "),
        ("sequence_parallel", True, r"\(sequence parallel off\), .* \(sequence parallel on\): "),
    ],
)
def test_another_order_of_sums_is_not_exact(
    mesh: Mesh, tmp_path: Path, field: str, value: Any, said: str
) -> None:
    """Also from a checkpoint that was written before there was the choice."""
    write(mesh, tmp_path, 1)
    path = tmp_path / "step_1" / "state.json"
    document = json.loads(path.read_text())
    del document["config"]["engine"][field]
    path.write_text(json.dumps(document))
    config = make_config(str(tmp_path))
    assert load(tmp_path / "step_1", FakeEngine(mesh, 0), config).exact
    other = replace(config, engine=replace(config.engine, **{field: value}))
    resumed = load(tmp_path / "step_1", FakeEngine(mesh, 0), other)
    assert not resumed.exact
    assert re.search(said, resumed.messages[0])


def test_other_format(mesh: Mesh, tmp_path: Path) -> None:
    write(mesh, tmp_path, 1)
    state = tmp_path / "step_1" / "state.json"
    state.write_text(state.read_text().replace("sltrain_dist checkpoint 1", "something 2"))
    with pytest.raises(UserError, match="format 'something 2'"):
        load(tmp_path / "step_1", FakeEngine(mesh, 0), make_config(str(tmp_path)))
