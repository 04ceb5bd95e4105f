"""The closed-form count against torch's own counter, and the arithmetic of FACTS."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sltrain_dist.config import MethodConfig, ModelConfig
from sltrain_dist.model.flops import Flops, flops_per_token, linear_flops, model_flops_per_token
from sltrain_dist.model.llama import Llama
from sltrain_dist.ops import cross_entropy
from sltrain_dist.params.paths import linears
from tests.model.small import FULL, METHODS, SLOPE, SLTRAIN, SMALL, batch, filled, small


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
@pytest.mark.parametrize(
    "config",
    [SMALL, small(num_key_value_heads=2, head_dim=24, intermediate_size=107, vocab_size=201)],
    ids=["plain", "grouped_padded"],
)
def test_equals_what_torch_counts(
    config: ModelConfig, method: MethodConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch's head operator is opaque to its counter; ours does the same products in the open
    monkeypatch.setattr(cross_entropy, "_torch_operator_fits", lambda *_: False)
    tokens, labels = batch(config)
    count, length = tokens.numel(), tokens.shape[1]
    plain = counted(filled(config, method), tokens, labels)
    predicted = flops_per_token(config, method, length, tokens=count)
    assert plain == pytest.approx(predicted.total * count, rel=1e-9)

    recomputed = counted(filled(config, method, checkpointing="block"), tokens, labels)
    predicted = flops_per_token(config, method, length, tokens=count, checkpointing="block")
    # torch stops recomputing at the last saved tensor: a block's last product may be left out
    shape = (config.hidden_size, config.padded_intermediate_size)
    last = config.num_hidden_layers * linear_flops(*shape, method, "composed", count).forward
    assert (predicted.total - last) * count <= recomputed <= predicted.total * count


def counted(model: Llama, tokens: torch.Tensor, labels: torch.Tensor) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, labels).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
def test_forward_alone_equals_what_torch_counts(method: MethodConfig) -> None:
    model = filled(SMALL, method)
    tokens, _ = batch(SMALL)
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(tokens)
    predicted = flops_per_token(SMALL, method, tokens.shape[1], tokens=tokens.numel())
    assert counter.get_total_flops() == pytest.approx(predicted.forward * tokens.numel(), rel=1e-9)


def test_composing_costs_what_facts_says() -> None:
    """FACTS: overhead 4r/3n over dense, 5% at 7b with 32k tokens."""
    method = MethodConfig(rank=1024, density=0.05)
    composed = linear_flops(4096, 4096, method, "composed", 32768).total
    dense = linear_flops(4096, 4096, FULL, "composed", 32768).total
    assert composed / dense == pytest.approx(1 + 4 * 1024 / (3 * 32768))
    assert composed / dense - 1 < 0.05


def test_factorized_counts_both_products() -> None:
    method = MethodConfig(rank=8, density=0.25)
    forward = 2 * 8 * 48 + 0.25 * 2 * 32 * 16
    assert linear_flops(32, 16, method, "needed", 1) == Flops(forward, 2 * forward)
    again = 2 * 8 * 16
    assert linear_flops(32, 16, method, "factorized", 1) == Flops(forward, 2 * forward + again)


def test_factorized_equals_what_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_torch_operator_fits", lambda *_: False)
    method = dataclasses.replace(SLTRAIN, density=1 / 16)  # which every window reaches exactly
    model = filled(SMALL, method)
    assert {linear.support.density for linear in linears(model)} == {1 / 16}
    for linear in linears(model):
        linear.path, linear.keep_hidden = "factorized", False
    tokens, labels = batch(SMALL)
    predicted = flops_per_token(
        SMALL, method, tokens.shape[1], tokens=tokens.numel(), path="factorized"
    )
    measured = counted(model, tokens, labels)
    assert measured == pytest.approx(predicted.total * tokens.numel(), rel=1e-9)


def test_model_flops_do_not_depend_on_how_they_are_computed() -> None:
    """MFU's numerator: logical widths, causal attention, sltrain far below the dense model."""
    config = ModelConfig.load("1b")
    method = MethodConfig(rank=512, density=0.03)
    dense = model_flops_per_token(config, FULL, 256)
    assert dense.total == pytest.approx(6 * (1339.1e6 - 2048 * 32000), rel=0.03)
    assert model_flops_per_token(config, method, 256).total < 0.6 * dense.total
    wider = dataclasses.replace(config, intermediate_size=config.padded_intermediate_size)
    assert model_flops_per_token(wider, FULL, 256).total > dense.total


def test_pruned_products_need_a_share() -> None:
    """2:4: half of the forward product and of dW, 13/32 of dx; the products that are computed are dense."""
    dense = linear_flops(64, 64, FULL, "composed", 1)
    assert linear_flops(64, 64, SLOPE, "composed", 1) == dense
    needed = linear_flops(64, 64, SLOPE, "needed", 1)
    assert needed == Flops(0.5 * dense.forward, (0.5 + 13 / 32) * dense.forward)
    assert linear_flops(384, 64, SLOPE, "needed", 1) == linear_flops(384, 64, FULL, "needed", 1)


def test_patterns_of_layers_are_counted_apart() -> None:
    def needed(pattern: str) -> float:
        method = dataclasses.replace(SLOPE, pattern=pattern)
        return model_flops_per_token(SMALL, method, 24).total

    assert needed("2:4,1=2:8") == pytest.approx((needed("2:4") + needed("2:8")) / 2)
    assert needed("2:8") < needed("2:4") < model_flops_per_token(SMALL, FULL, 24).total
