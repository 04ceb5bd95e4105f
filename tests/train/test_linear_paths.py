"""Who decides the path of a linear: the flag, then the checkpoint, the cache, the cost model, the clock."""

import dataclasses
import json
import os
from types import SimpleNamespace

import pytest
import torch

from sltrain_dist.config import (
    DataConfig,
    EngineConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from sltrain_dist.ops.factorized import workspace_bytes
from sltrain_dist.params import make_linear, paths
from sltrain_dist.train import linear_paths
from sltrain_dist.train.build import make_model
from sltrain_dist.train.checkpoint_identity import changes
from sltrain_dist.train.linear_paths import CACHE, decide
from sltrain_dist.train.memory import estimate_memory

METHOD = MethodConfig(rank=8, density=0.125)
CPU = torch.device("cpu")


def model(method=METHOD):
    """Two kinds of linears, one of them twice."""
    shapes = [(64, 96), (96, 64), (64, 96)]
    return torch.nn.Sequential(*(make_linear(f"l{i}", *s, method=method) for i, s in enumerate(shapes)))  # fmt: skip


def config(folder, **changed):
    data = DataConfig(cache_dir=str(folder), sequence_length=16)
    llama = ModelConfig("tiny", 250, 64, 176, 1, 4, 2, 16)
    plain = TrainConfig(llama, METHOD, data, OptimizerConfig(), EngineConfig(batch_size=2))
    return dataclasses.replace(plain, **changed)


@pytest.fixture
def clock(monkeypatch):
    """Timing that says what it is told and counts, on keys the cost model finds close."""
    state = SimpleNamespace(timed=[], factorized=1.0)

    def measure(key, situation, limit):
        state.timed.append(key.text)
        return {"composed": 2.0, "factorized": state.factorized}

    monkeypatch.setattr(paths, "measure", measure)
    monkeypatch.setattr(paths, "is_close", lambda key, situation: True)
    return state


def checkpoint(folder, chosen):
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"linear_paths": chosen}))
    return folder


def test_each_shape_is_timed_once_and_then_cached(clock, tmp_path):
    first = decide(config(tmp_path), model(), CPU, None)
    assert len(clock.timed) == len(set(clock.timed)) == 2
    assert set(first.chosen.values()) == {"factorized"}
    clock.factorized = 3.0
    second = decide(config(tmp_path), model(), CPU, None)
    assert len(clock.timed) == 2
    assert second.chosen == first.chosen
    assert set(second.sources.values()) == {"cached"}


def test_summary_line(clock, tmp_path):
    built = model()
    first = decide(config(tmp_path), built, CPU, None)
    first.apply(built)
    assert first.describe(built) == "3 factorized, x A^T kept (of the shapes 2 timed, 0 cached)"
    built[1].path = "composed"
    assert first.describe(built).startswith("2 factorized, 1 composed, x A^T kept (")
    pinned = decide(config(tmp_path, linear_path="composed"), built, CPU, None)
    pinned.apply(built)
    assert pinned.describe(built) == "3 composed (pinned)"
    full = model(MethodConfig(method="full"))
    assert decide(config(tmp_path), full, CPU, None).describe(full) == ""


@pytest.mark.parametrize(
    "changed", [{"engine": EngineConfig(batch_size=4)}, {"engine": EngineConfig(batch_size=2, dtype="bfloat16")}]
)  # fmt: skip
def test_another_situation_is_another_entry(clock, tmp_path, changed):
    decide(config(tmp_path), model(), CPU, None)
    decide(config(tmp_path, **changed), model(), CPU, None)
    assert len(clock.timed) == 4
    decide(config(tmp_path), model(), CPU, None)
    assert len(clock.timed) == 4, "both are kept"


@pytest.mark.parametrize("name", ["__version__", "torch"])
def test_another_version_is_timed_again(clock, tmp_path, monkeypatch, name):
    decide(config(tmp_path), model(), CPU, None)
    if name == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    else:
        monkeypatch.setattr(linear_paths, "__version__", "9.9")
    decide(config(tmp_path), model(), CPU, None)
    assert len(clock.timed) == 4


@pytest.mark.parametrize("path", ["composed", "factorized"])
def test_pinned_asks_nobody(clock, tmp_path, path):
    chosen = decide(config(tmp_path, linear_path=path), model(), CPU, tmp_path / "missing")
    assert set(chosen.chosen.values()) == {path}
    assert not clock.timed
    assert not os.listdir(tmp_path)


def test_checkpoint_comes_before_the_cache(clock, tmp_path):
    cached = decide(config(tmp_path), model(), CPU, None)
    saved = {f"{cached.situation}, {text}": "composed" for text in list(cached.chosen)[:1]}
    step = checkpoint(tmp_path / "step_1", saved)
    resumed = decide(config(tmp_path), model(), CPU, step)
    assert list(resumed.chosen.values()) == ["composed", "factorized"]
    assert list(resumed.sources.values()) == ["checkpoint", "cached"]
    assert "1 as in the checkpoint" in resumed.describe(model())


def test_checkpoint_of_another_situation_or_version_says_nothing(clock, tmp_path):
    here = decide(config(tmp_path), model(), CPU, None)
    other = {f"Cray-1, {text}": "composed" for text in here.chosen}
    step = checkpoint(tmp_path / "step_1", other)
    assert decide(config(tmp_path), model(), CPU, step).chosen == here.chosen
    (step / "state.json").write_text("{}")
    assert decide(config(tmp_path), model(), CPU, step).chosen == here.chosen
    strange = {f"{here.situation}, {text}": "teleported" for text in here.chosen}
    (step / "state.json").write_text(json.dumps({"linear_paths": strange}))
    assert decide(config(tmp_path), model(), CPU, step).chosen == here.chosen


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"format": "sltrain_dist linear pa',
        "[1, 2]",
        '{"format": "another", "seconds": {}}',
        '{"format": "sltrain_dist linear paths 1"}',
        '{"format": "sltrain_dist linear paths 1", "seconds": [3]}',
        "[" * 100_000,
        b"\xff\xfe\x00",
    ],
)
def test_damaged_or_foreign_cache_is_rewritten(clock, tmp_path, content):
    file = tmp_path / CACHE
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    decide(config(tmp_path), model(), CPU, None)
    assert len(clock.timed) == 2
    decide(config(tmp_path), model(), CPU, None)
    assert len(clock.timed) == 2
    assert os.listdir(tmp_path) == [CACHE], "nothing temporary is left"


@pytest.mark.parametrize("damage", [None, {"composed": "fast"}, {"composed": -1.0}, {}])
def test_damaged_entry_is_timed_again(clock, tmp_path, damage):
    decide(config(tmp_path), model(), CPU, None)
    content = json.loads((tmp_path / CACHE).read_text())
    name = next(iter(content["seconds"]))
    entry = content["seconds"][name]
    content["seconds"][name] = entry | damage if damage else damage
    (tmp_path / CACHE).write_text(json.dumps(content))
    decide(config(tmp_path), model(), CPU, None)
    assert len(clock.timed) == 3
    assert json.loads((tmp_path / CACHE).read_text())["seconds"][name] == entry


def test_cache_that_cannot_be_written(clock, tmp_path):
    (tmp_path / "file").write_text("")
    chosen = decide(config(tmp_path / "file"), model(), CPU, None)
    assert set(chosen.sources.values()) == {"timed"}


def test_what_the_cost_model_settles_is_not_timed(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "is_close", lambda key, situation: key.support.shape == (64, 96))
    chosen = decide(config(tmp_path), model(), CPU, None)
    assert sorted(chosen.sources.values()) == ["predicted", "timed"]
    assert "of the shapes 1 timed, 0 cached, 1 clear without" in chosen.describe(model())


@pytest.mark.parametrize("hf", [False, True])
def test_model_is_made_with_its_paths(tmp_path, hf):
    pinned = config(tmp_path, linear_path="factorized", use_hf_model=hf)
    blank = make_model(pinned, "sdpa", "torch", device="meta", dtype=torch.float32)
    assert {linear.path for linear in paths.linears(blank)} == {"composed"}
    chosen = decide(pinned, blank, CPU, None)
    made = make_model(pinned, "sdpa", "torch", chosen, device="meta", dtype=torch.float32)
    assert [linear.path for linear in paths.linears(made)] == ["factorized"] * 7
    stored = paths.assigned(made)
    assert set(stored.values()) == {"factorized"}
    assert all("32 tokens" in key for key in stored)


def test_memory_of_w_is_counted_where_w_is_built_and_of_h_where_it_is_kept(tmp_path):
    counts = {"total": 1000, "indices_bytes": 10}

    def estimate(path, keep_hidden):
        pinned = config(tmp_path, linear_path=path, keep_hidden=keep_hidden)
        return estimate_memory(pinned, counts, 1, decide(pinned, model(), CPU, None))

    lean = estimate("factorized", "no")
    tokens, layers = 32, 1
    entries = int(METHOD.density * 64 * 176)
    workspace = workspace_bytes(176, 64, entries, METHOD.rank, tokens, torch.get_num_threads())
    assert lean["workspaces"] == workspace["backward"]
    assert estimate("composed", "auto")["workspaces"] >= 64 * 176 * 4
    kept = estimate("factorized", "yes")
    assert kept["activations"] - lean["activations"] == tokens * layers * 7 * METHOD.rank * 4
    assert estimate("factorized", "auto") == kept, "on a CPU"


@pytest.mark.parametrize(("flag", "kept"), [("auto", None), ("yes", True), ("no", False)])
def test_keep_hidden_reaches_the_linears(tmp_path, flag, kept):
    pinned = config(tmp_path, linear_path="factorized", keep_hidden=flag)
    blank = make_model(pinned, "sdpa", "torch", device="meta", dtype=torch.float32)
    chosen = decide(pinned, blank, CPU, None)
    made = make_model(pinned, "sdpa", "torch", chosen, device="meta", dtype=torch.float32)
    assert {linear.keep_hidden for linear in paths.linears(made)} == {kept}


def test_changes_are_said_in_one_line(tmp_path):
    before = config(tmp_path)
    document = {"config": json.loads(json.dumps(before.to_json())), "linear_paths": {"a": "composed"}}  # fmt: skip
    assert changes(document, before, {"a": "composed"}) == []
    (line,) = changes(document, before, {"a": "composed", "b": "factorized"})
    assert "chosen anew: now for 'b', in the checkpoint for 'a'" in line
    old = {key: value for key, value in document.items() if key != "linear_paths"}
    assert changes(old, before, {"a": "composed"}) == []
    (line,) = changes(old, before, {"a": "composed", "b": "factorized"})
    assert line.startswith("1 of 2 shapes of linears were composed in the checkpoint")
    after = dataclasses.replace(
        before,
        optimizer=OptimizerConfig(lr=1e-4, scheduler="linear", weight_decay=0.1),
        method=dataclasses.replace(METHOD, dropout=0.1),
        engine=EngineConfig(batch_size=2, dtype="bfloat16"),
    )
    (line,) = changes(document, after, {})
    for flag in ("--lr 0.003 -> 0.0001", "--scheduler cosine -> linear", "--weight_decay 0.0 -> 0.1",
                 "--lora_dropout 0.0 -> 0.1", "--dtype float32 -> bfloat16"):  # fmt: skip
        assert flag in line
    assert "\n" not in line
    (line,) = changes(document, before, {"a": "factorized", "b": "factorized"})
    assert line.startswith("--linear_path factorized: 1 of 2 shapes")
    assert "\n" not in line
