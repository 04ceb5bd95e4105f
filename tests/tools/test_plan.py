"""The fake run against real memory, against what engines say they hold, and against the closed formula."""

import dataclasses
import json
from collections import Counter
from typing import ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sltrain_dist.optim import OPTIMIZERS
from sltrain_dist.tools.plan import Request, blank_model, configure, parse_bytes, plan, settle
from sltrain_dist.tools.plan_fit import _settings
from sltrain_dist.tools.plan_live import Live
from sltrain_dist.train.memory import KINDS
from sltrain_dist.utils.errors import UserError

SMALL = ("--model=llama_9m", "--max_length=64", "--batch_size=2", "--linear_path=factorized")


def planned(*flags, gpus=1, device="cpu"):
    total = f"--total_batch_size={2 * gpus}"
    others = {"--method=full", "--method=slope"}  # which have no choice of path
    base = SMALL[:-1] if others & set(flags) else SMALL
    return plan(Request((*base, total, *flags), gpus, device, None, 1.0, 1.0))


def test_what_is_freed_is_not_counted():
    with FakeTensorMode(), Live("cpu") as live:
        first = torch.empty(1000)
        with live.during("activations"):
            second = first * 2
        del first
        third = second.view(-1)[5:]  # no memory of its own
        del second
        fourth = torch.empty(500)
        del third, fourth
    assert live.peak() == dict.fromkeys(KINDS, 0) | {"workspaces": 4000, "activations": 4000}
    assert sum(list(live.history())[-1].values()) == 0


def test_storage_that_is_resized_is_followed():
    with FakeTensorMode(), Live("cpu") as live:
        tensor = torch.empty(1000)
        tensor.untyped_storage().resize_(0)
        other = torch.empty(10)
        tensor.untyped_storage().resize_(4000)
        del other
        del tensor
    assert sum(live.peak().values()) == 4040
    assert [sum(now.values()) for now in live.history()][-1] == 0


def test_a_gpu_gives_whole_blocks():
    with FakeTensorMode(), Live("cuda") as live:
        tensor = torch.empty(1)
        del tensor
    assert sum(live.peak().values()) == 512


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_what_is_held_is_cut_evenly(gpus):
    peak = planned(gpus=gpus).measured.peak
    whole = planned().measured.peak
    for kind in ("weights", "optimizer", "offsets"):
        assert peak[kind] == pytest.approx(whole[kind] / gpus, rel=0.02, abs=4096), kind
    assert peak["optimizer"] == pytest.approx(2 * peak["weights"], rel=0.01)


def test_eight_bits_and_per_layer():
    usual = planned("--optimizer=adamw").measured.peak
    small = planned("--optimizer=adam8bit_per_layer", "--embedding_state_bits=8").measured.peak
    assert small["optimizer"] == pytest.approx(usual["optimizer"] * (1 + 4 / 256) / 4, rel=0.02)
    assert small["gradients"] <= usual["gradients"]


def test_a_per_layer_update_is_run_to_its_end():
    """A loss that the fake run took for infinite would end it before backward."""
    usual, inside = (planned(f"--optimizer=adam8bit{end}").measured for end in ("", "_per_layer"))
    assert len(inside.history) > 0.9 * len(usual.history)


def test_checkpointing_keeps_less():
    kept = [
        planned(f"--activation_checkpointing={kind}").measured.peak["activations"]
        for kind in ("none", "selective", "block")
    ]
    assert kept[0] > 1.1 * kept[1] > 1.1 * kept[2]


@pytest.mark.parametrize("flags", [
    ("--optimizer=adamw",),
    ("--optimizer=adam8bit_per_layer", "--activation_checkpointing=block"),
    ("--ds_config=ds_configs/zero2.json",),
    ("--ds_config=ds_configs/zero3.json", "--optimizer=adam8bit"),
])  # fmt: skip
def test_formula_is_near_the_fake_run(flags):
    found = planned(*flags, gpus=2)
    assert 0.7 < found.setting.formula["total"] / found.total < 1.4


def test_more_ranks_than_rows_and_tensor_parallelism():
    wide = planned("--tensor_parallel=2", "--sequence_parallel", gpus=512, device="cuda")
    trained = wide.setting.parameters["total"]
    # a rank of 256 holds a row of every tensor at least, and the first rank always has one
    assert trained * 4 / 512 < wide.measured.peak["weights"] < 8 * trained * 4 / 512
    assert torch.distributed.is_initialized() is False


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("1.5 MiB", 3 * 2**19)])  # fmt: skip
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["abc", "-1GiB", "0GiB", "1XB", "", "nan", "24"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="--gpu_memory"):
        parse_bytes(text)


def test_time_follows_from_throughput_and_wire():
    request = Request((*SMALL, "--total_batch_size=4"), 2, "cpu", None, 1.0, 1.0)
    config = configure(request)
    one = settle(request, config, blank_model(config))
    assert one.seconds == pytest.approx(one.flops / 1e12 + one.wire / 1e9)
    faster = dataclasses.replace(request, tflops=2.0, bandwidth=2.0)
    assert settle(faster, config, blank_model(config)).seconds == pytest.approx(one.seconds / 2)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "galore_adamw"])
def test_every_optimizer_can_be_planned(name):
    if name == "galore_adamw":
        pytest.importorskip("galore_torch")
    found = planned(
        f"--optimizer={name}", "--method=full", *(["--proj_rank=16"] if "galore" in name else [])
    )
    held, formula = found.measured.peak["optimizer"], found.setting.formula["optimizer"]
    if name in ("adafactor", "sgd"):
        assert formula == 0
        assert held < found.measured.peak["weights"] / 50
    else:
        assert formula == pytest.approx(held, rel=0.12)


class Counted(Live):
    """Bytes that collectives of more than a few numbers send over two ranks."""

    sent: ClassVar[Counter[str]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("c10d::"):
            tensors = [
                t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)
            ]
            size = max(t.numel() * t.element_size() for t in tensors)
            self.sent["bytes"] += size * (2 if "allreduce" in name else 1) // 2
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("method", ["full", "sltrain", "slope"])
@pytest.mark.parametrize("more", [(), ("--sequence_parallel",)])
def test_the_wire_carries_what_is_computed_again_too(method, more, monkeypatch):
    from sltrain_dist.tools import plan_run

    monkeypatch.setattr(plan_run, "Live", Counted)
    for kind in ("none", "block"):
        Counted.sent.clear()
        flags = (
            f"--method={method}",
            f"--activation_checkpointing={kind}",
            "--tensor_parallel=2",
            "--rank=32",
        )
        request = Request(
            (*SMALL[:-1], "--total_batch_size=2", *flags, *more), 2, "cpu", None, 1.0, 1.0
        )
        found = plan(request)
        assert found.setting.wire == pytest.approx(Counted.sent["bytes"], abs=64), kind


def test_a_ds_json_leaves_the_format_to_the_gpu(tmp_path):
    target = tmp_path / "zero.json"
    for bf16, expected in ({"enabled": "auto"}, "bfloat16"), ({"enabled": False}, "float32"):
        target.write_text(json.dumps({"bf16": bf16, "zero_optimization": {"stage": 2}}))
        request = Request((*SMALL, f"--ds_config={target}"), 2, "cuda", None, 1.0, 1.0)
        assert configure(request).engine.dtype == expected
    offload = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    target.write_text(json.dumps({"zero_optimization": offload}))
    with pytest.raises(UserError, match="offload_optimizer: the planner cannot"):
        configure(request)
    assert configure(dataclasses.replace(request, device="cpu")).engine.stage == 3


def test_the_search_is_of_what_pretrain_takes():
    base = (
        "--model=llama_9m",
        "--max_length=64",
        "--tensor_parallel=1",
        "--linear_path=factorized",
    )

    def searched(*flags):
        request = Request((*base, *flags), 2, "cpu", 2**30, 1.0, 1.0)
        return [(each.config.activation_checkpointing, each.config) for each in _settings(request)]

    per_layer = searched("--per_layer")
    assert {config.engine.batch_size for _, config in per_layer} == {1, 2, 4, 8, 16, 32, 64}
    assert all(config.engine.gradient_accumulation == 1 for _, config in per_layer)
    assert all(config.total_batch_size == 2 * config.engine.batch_size for _, config in per_layer)
    assert {kind for kind, _ in searched()} == {"none", "block", "selective"}
    assert {kind for kind, _ in searched("--use_hf_model")} == {"none", "block"}


def test_offsets_are_cut_under_zero_3():
    whole, cut = (
        planned(f"--ds_config=ds_configs/zero{stage}.json", gpus=2).measured.peak["offsets"]
        for stage in (2, 3)
    )
    assert cut == pytest.approx(whole / 2, rel=0.01)


def test_slope_is_planned():
    """Moments of half the weights, offsets and masks, and what choosing masks sends, spread over the updates between."""
    flags = ("--method=slope", "--max_length=64", "--total_batch_size=4")
    often, never = (planned(*flags, f"--mask_change_freq={every}", gpus=2) for every in (1, 0))
    counts = often.setting.parameters
    kept = counts["sparse"]
    positions = counts["indices_bytes"] - kept / 8
    assert positions == pytest.approx(kept / 4)
    sent = often.setting.wire - never.setting.wire
    assert sent == pytest.approx((kept * 4 + positions) / 2)
    peak, formula = often.measured.peak, often.setting.formula
    assert peak["offsets"] == formula["offsets"] == counts["indices_bytes"] // 2
    assert peak["optimizer"] == pytest.approx(2 * 4 * counts["total"] / 2, rel=0.02)
    assert peak["workspaces"] > 0
