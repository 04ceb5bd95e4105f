"""Logits with the cache equal those without, however a text is cut into calls."""

from typing import Any

import pytest
import torch

from sltrain_dist.config import MethodConfig
from sltrain_dist.model.backends import sdpa
from sltrain_dist.model.cache import KeyValueCache
from sltrain_dist.model.llama import Llama
from sltrain_dist.model.rope import same_angles
from tests.model.small import FULL, METHODS, batch, filled, small
from tests.model.test_hf_equality import LLAMA3, LONGROPE, YARN

LENGTH = 24
CUTS = {  # lengths of the calls that make up the text
    "whole": [24],
    "tokens": [1] * 24,
    "prefill_then_tokens": [9] + [1] * 15,
    "chunks": [5, 7, 1, 11],
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped_queries": {"num_key_value_heads": 2},
    "one_key_head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "padded": {"vocab_size": 201, "intermediate_size": 107},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": YARN},
    "longrope": {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 32}},
}


def in_calls(model: Llama, tokens: torch.Tensor, calls: list[int]) -> torch.Tensor:
    cache = KeyValueCache(len(model.blocks), capacity=40)  # more room than is used
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split(calls, dim=1)]
    assert cache.length == sum(calls)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("calls", CUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_those_without_cache(architecture: str, calls: str) -> None:
    config = small(initializer_range=0.1, **ARCHITECTURES[architecture])
    model = filled(config)
    tokens, _ = batch(config, rows=3, length=LENGTH)
    with torch.no_grad():
        expected = model(tokens)
    assert expected.std() > 0.3  # else 1e-5 would say nothing
    assert (in_calls(model, tokens, CUTS[calls]) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
def test_every_parameterization(method: MethodConfig) -> None:
    model = filled(small(initializer_range=0.1), method)
    tokens, _ = batch(model.config, length=LENGTH)
    with torch.no_grad():
        expected = model(tokens)
    assert (in_calls(model, tokens, CUTS["chunks"]) - expected).abs().max() < 1e-5


def test_mask_is_aligned_with_the_last_key() -> None:
    """torch's own causal mask starts at the first key: query 0 of a chunk would see one key alone."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 7, 2, 4, generator=generator) for _ in range(3))
    expected = torch.empty_like(q)
    for position in range(7):
        scores = torch.einsum("bhd,bshd->bhs", q[:, position], k[:, : position + 1]) / 2
        expected[:, position] = torch.einsum(
            "bhs,bshd->bhd", scores.softmax(-1), v[:, : position + 1]
        )
    for new in (1, 3, 7):
        torch.testing.assert_close(sdpa(q[:, -new:], k, v), expected[:, -new:])


def test_cut_forgets_what_came_after() -> None:
    model = filled(small(initializer_range=0.1))
    tokens, _ = batch(model.config, length=LENGTH)
    cache = KeyValueCache(len(model.blocks), LENGTH)
    with torch.no_grad():
        model(tokens, cache=cache)
        cache.cut(10)
        again = model(tokens[:, 10:].flip(0), cache=cache)
        expected = model(torch.cat((tokens[:, :10], tokens[:, 10:].flip(0)), dim=1))
    torch.testing.assert_close(again, expected[:, 10:], rtol=0, atol=1e-5)


def test_checkpointing_takes_nothing_up_twice() -> None:
    model = filled(small(), checkpointing="block")
    tokens, _ = batch(model.config)
    cache = KeyValueCache(len(model.blocks), LENGTH)
    model(tokens, cache=cache)
    assert cache.length == tokens.shape[1]


def test_scalings_that_depend_on_the_length_are_refused_where_they_change() -> None:
    longrope = small(rope_scaling={**LONGROPE, "original_max_position_embeddings": 16})
    dynamic = small(
        rope_scaling={"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=16
    )
    for config, then in ((longrope, 40), (dynamic, 17)):
        assert same_angles(config, 3, 16)
        assert not same_angles(config, 16, then)
        model = filled(config)
        tokens, _ = batch(config, length=20)
        with pytest.raises(ValueError, match="rope scaling changes"):
            in_calls(model, tokens, [16, 4])
        whole = in_calls(model, tokens, [20])  # at once it is right
        with torch.no_grad():
            torch.testing.assert_close(whole, model(tokens), rtol=0, atol=1e-5)
    assert same_angles(longrope, 17, 40)
    assert not same_angles(dynamic, 17, 18)


def test_what_does_not_fit_is_refused() -> None:
    model = filled(small(), FULL)
    tokens, _ = batch(model.config, length=8)
    cache = KeyValueCache(len(model.blocks), capacity=10)
    with torch.no_grad():
        model(tokens, cache=cache)
        with pytest.raises(ValueError, match="11 positions do not fit a cache of 10"):
            model(tokens[:, :3], cache=cache)
        with pytest.raises(ValueError, match="1 texts, the cache is of 2"):
            model(tokens[:1, :1], cache=cache)
