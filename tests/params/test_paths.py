"""The choice of path: keys tell costs apart, the cost model has the right signs, timing measures what runs."""

import dataclasses

import pytest
import torch

from sltrain_dist.config import MethodConfig
from sltrain_dist.ops import kernels
from sltrain_dist.params import make_linear, paths

CPU = torch.device("cpu")


def situation(tokens=4096, dtype=torch.float32, device="cpu"):
    return paths.Situation(torch.device(device), dtype, tokens)


def linear(out=64, in_=96, parallel="column", device="meta", **method):
    config = MethodConfig(**{"rank": 8, "density": 0.125, **method})
    return make_linear("layer", out, in_, method=config, parallel=parallel, device=device)


def key(*shape, **options):
    return paths.key_of(linear(*shape, **options))


@pytest.fixture
def with_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "loaded", lambda: ("cpu",))


def test_what_costs_differently_has_another_text():
    block = {"support": "block", "block_size": 4}
    keys = [
        key(),
        key(96, 64),
        key(rank=16),
        key(dropout=0.1),
        key(density=0.25),
        key(support="uniform"),
        key(64, 64, **block),
        key(64, 64, parallel="row", **block),
        key(64, 64, support="block", block_size=8),
    ]
    assert len({k.text for k in keys}) == len(keys)
    assert key(alpha=3.0, seed=8).text == key().text
    assert key(dropout=0.1).rank == 0
    assert key().text.startswith("64x96 rank 8 fan_in ")


def test_situation_names_all_that_matters():
    texts = {situation().text, situation(64).text, situation(dtype=torch.bfloat16).text}
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    texts.add(situation().text)
    torch.set_num_threads(threads)
    assert len(texts) == 4
    assert torch.backends.cpu.get_cpu_capability() in situation().text
    assert "4096 tokens" in situation().text


def test_kernels_are_part_of_the_situation(monkeypatch):
    found = set()
    for loaded in ((), ("cpu",), ("cpu", "cuda")):
        monkeypatch.setattr(kernels, "loaded", lambda loaded=loaded: loaded)
        found.add(situation().text)
    assert len(found) == 3


@pytest.mark.usefixtures("with_kernels")
def test_cost_model_on_a_cpu():
    """Many tokens: fewer operations win. One token on a large matrix: building W loses by far."""
    many = key(1376, 512, rank=128, density=0.03)
    assert paths.settled(many, situation()) == "factorized"
    seconds = paths.predict(many, situation())
    assert paths.predict(many, situation(8192))["composed"] > 1.8 * seconds["composed"]
    assert paths.settled(many, situation(1)) == "factorized"
    assert not paths.is_close(many, situation(1))
    wide = key(512, 512, rank=512, density=0.03)
    assert paths.settled(wide, situation(32768)) == "composed"


def test_without_kernels_the_sparse_product_is_dense(monkeypatch):
    monkeypatch.setattr(kernels, "loaded", lambda: ())
    assert paths.settled(key(1376, 512, rank=128, density=0.03), situation()) == "composed"


def test_single_entries_never_pay_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(paths, "find_spec", lambda name: object())
    gpu = situation(32768, torch.bfloat16, "cuda:0")
    large = {"rank": 1024, "density": 0.05}
    supports = [
        {"support": "fan_in"},
        {"support": "uniform"},
        {"support": "block", "block_size": 8},
    ]
    for support in supports:
        single = key(4096, 4096, **large, **support)
        assert paths.settled(single, gpu) == "composed"
        assert not paths.is_close(single, gpu)
    block = key(4096, 4096, **large, support="block", block_size=64)
    assert paths.settled(block, gpu) == "factorized"
    monkeypatch.setattr(paths, "find_spec", lambda name: None)
    assert paths.settled(block, gpu) == "composed", "without Triton the blocks are made dense"
    assert not paths.is_close(block, gpu)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"support": "uniform"},
        {"support": "block", "block_size": 4},
        {"support": "block", "block_size": 4, "parallel": "row"},
        {"dropout": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measure_every_kind(options, dtype):
    state = torch.get_rng_state()
    seconds = paths.measure(key(**options), situation(300, dtype), 0.05)
    assert set(seconds) == {"composed", "factorized"}
    assert all(0 < value < 5 for value in seconds.values())
    assert torch.equal(torch.get_rng_state(), state), "the run's random numbers are its own"


class Slow:
    """A clocked stand-in for the operator: so many seconds a token and path, and a count of calls."""

    def __init__(self, **per_token):
        self.per_token, self.now, self.calls = per_token, 0.0, []

    def turn(self, trial):
        def once(path):
            tokens = trial.x.shape[0]
            self.calls.append((path, tokens))
            self.now += self.per_token[path] * tokens
            return self.per_token[path] * tokens

        return once


@pytest.fixture
def clocked(monkeypatch):
    def use(**per_token):
        slow = Slow(**per_token)
        monkeypatch.setattr(paths._Trial, "_once", lambda trial, path: slow.turn(trial)(path))
        monkeypatch.setattr(paths.time, "perf_counter", lambda: slow.now)
        return slow

    return use


def test_large_models_are_timed_with_fewer_tokens(clocked):
    """1 ms a token: 32768 tokens would take a minute a turn."""
    slow = clocked(composed=1e-3, factorized=0.9e-3)
    seconds = paths.measure(key(512, 512), situation(32768), 5.0)
    assert slow.now < 6.0
    longest = max(tokens for _, tokens in slow.calls)
    assert longest >= 256
    assert longest * 1.9e-3 <= paths.TURN_SECONDS
    assert seconds["composed"] > 10, "scaled to the tokens of the run"
    assert paths.faster(seconds) == "factorized"


def test_turns_are_paired_and_alternate(clocked):
    slow = clocked(composed=1e-6, factorized=2e-6)
    seconds = paths.measure(key(), situation(512), 5.0)
    assert seconds["factorized"] == pytest.approx(2 * seconds["composed"])
    timed = [path for path, tokens in slow.calls if tokens == 512][2:]
    assert len(timed) == 30
    assert timed.count("composed") == 15
    firsts = timed[::2]
    assert set(firsts[::2]) != set(firsts[1::2]), "who goes first changes from turn to turn"


def test_one_disturbed_turn_changes_nothing(clocked):
    slow = clocked(composed=1e-6, factorized=1.05e-6)
    quiet, count = slow.turn, iter(range(1000))

    def disturbed(trial):
        def once(path):
            return quiet(trial)(path) * (50 if next(count) % 9 == 6 else 1)

        return once

    slow.turn = disturbed
    assert paths.faster(paths.measure(key(), situation(256), 5.0)) == "composed"


def test_all_timing_together_is_bounded():
    assert paths.budget(1) <= paths.TOTAL_SECONDS / 3
    for count in (1, 4, 30):
        assert count * paths.budget(count) <= paths.TOTAL_SECONDS


def test_assign_and_read_back():
    model = torch.nn.Sequential(linear(), linear(96, 64), linear(), torch.nn.Linear(3, 3))
    assert paths.assigned(model) == {}
    first, second = key().text, key(96, 64).text
    paths.assign(model, "here", {first: "factorized", second: "composed"})
    assert [module.path for module in model[:3]] == ["factorized", "composed", "factorized"]
    assert paths.assigned(model) == {f"here, {first}": "factorized", f"here, {second}": "composed"}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_modules_compute_the_same_by_either_path(dropout):
    layer = linear(device="cpu", dropout=dropout)
    for parameter in layer.parameters():
        if parameter.is_floating_point():
            torch.nn.init.normal_(parameter)
    spec = layer.specs["offsets"]
    flat = spec.initial.flat(42, "layer.offsets", 0, layer.offsets.numel())
    layer.offsets.data.copy_(flat.view(layer.offsets.shape))
    x, results = torch.randn(5, 96), []
    for path in ("composed", "factorized"):
        layer.path = path
        torch.manual_seed(0)
        results.append(layer(x))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_key_survives_replacement_of_what_does_not_cost():
    support = linear().support
    assert paths.LinearKey(support, 8) == paths.LinearKey(dataclasses.replace(support), 8)
