"""The fake run against real memory, against what engines say they hold, and against the closed formula."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sltrain_dist.tools.plan import Request, blank_model, configure, parse_bytes, plan, settle
from sltrain_dist.tools.plan_live import Live
from sltrain_dist.train.memory import KINDS
from sltrain_dist.utils.errors import UserError

SMALL = ("--model=llama_9m", "--max_length=64", "--batch_size=2", "--linear_path=factorized")


def planned(*flags, gpus=1, device="cpu"):
    total = f"--total_batch_size={2 * gpus}"
    return plan(Request((*SMALL, total, *flags), gpus, device, None, 1.0, 1.0))


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
    assert live.history is not None
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


def test_checkpointing_keeps_less():
    kept = [
        planned(f"--activation_checkpointing={kind}").measured.peak["activations"]
        for kind in ("none", "selective", "block")
    ]
    assert kept == sorted(kept, reverse=True)


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
    assert wide.measured.peak["weights"] > 0
    assert torch.distributed.is_initialized() is False


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("1.5 MiB", 3 * 2**19), ("512", 512)])  # fmt: skip
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["abc", "-1GiB", "0", "1XB", "", "nan"])
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
