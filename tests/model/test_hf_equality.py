"""Logits equal transformers' LLaMA with the same weights: pins layout, rotation, masks and padding."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sltrain_dist.config import ModelConfig
from sltrain_dist.model.llama import Llama
from tests.model.small import FULL, batch

transformers = pytest.importorskip("transformers")

BASE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.3 * i for i in range(8)],
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped_queries": {"num_key_value_heads": 2},
    "one_key_head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 24},
    "padded": {"intermediate_size": 107, "vocab_size": 201},
    "padded_biases_tied": {
        "intermediate_size": 107,
        "vocab_size": 201,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "theta": {"rope_theta": 500000.0},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic_within": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "dynamic_beyond": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
        "max_position_embeddings": 16,
    },
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "yarn": {"rope_scaling": YARN},
    "yarn_mscale": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}},
    "yarn_untruncated": {"rope_scaling": {**YARN, "truncate": False, "beta_fast": 24}},
    "longrope_long": {"rope_scaling": LONGROPE},
    "longrope_short": {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 30}},
}


def copy_weights(ours: Llama, theirs: Any) -> None:
    """Write HF's weights into the logical corner of ours; padding stays zero."""
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
        for name, source in theirs.named_parameters():
            target = ours.get_parameter(name)
            target[tuple(slice(0, size) for size in source.shape)] = source


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    hf_config = transformers.LlamaConfig(**{**BASE, **CASES[case]}, attn_implementation="eager")
    hf_config.save_pretrained(tmp_path)  # so that ModelConfig.load reads what transformers writes
    theirs = transformers.LlamaForCausalLM(hf_config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    config = ModelConfig.load(str(tmp_path))
    ours = Llama(config, FULL, device="cpu")
    assert set(dict(ours.named_parameters())) == set(dict(theirs.named_parameters()))
    copy_weights(ours, theirs)

    tokens, labels = batch(config)
    logits, expected = ours(tokens), theirs(tokens).logits
    assert logits.shape == expected.shape
    assert expected.std() > 0.3  # else 1e-5 would say nothing
    assert (logits - expected).abs().max() < 1e-5

    ours(tokens, labels).backward()
    torch.nn.functional.cross_entropy(
        expected.flatten(0, 1), labels.flatten(), reduction="sum"
    ).backward()
    for name, source in theirs.named_parameters():
        gradient = ours.get_parameter(name).grad
        assert gradient is not None
        inside = tuple(slice(0, size) for size in source.shape)
        torch.testing.assert_close(gradient[inside], source.grad, rtol=1e-4, atol=1e-4)
        gradient[inside] = 0
        assert not gradient.any(), f"{name}: padding got a gradient"


def test_preset_equals_transformers_in_both_spellings_of_its_config(tmp_path: Path) -> None:
    """The preset as shipped, and as transformers 5 (rope_parameters) or 4 (rope_theta) rewrites it."""
    preset = Path(__file__).parents[2] / "sltrain_dist/presets/llama_9m.json"
    raw = json.loads(preset.read_text())
    hf_config = transformers.LlamaConfig(**{**raw, "pad_token_id": None})
    theirs = transformers.LlamaForCausalLM(hf_config).eval()
    hf_config.save_pretrained(tmp_path)
    config = ModelConfig.load("llama_9m")
    rewritten = ModelConfig.load(str(tmp_path))
    assert (rewritten.rope_theta, rewritten.rope_scaling) == (10000.0, None)
    ours = Llama(config, FULL, device="cpu")
    copy_weights(ours, theirs)
    tokens, _ = batch(config, length=100)
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-5
