"""Presets against FACTS: sizes, and the parameter counts of the published table."""

import json

import pytest

from sltrain_dist.config import PRESETS, MethodConfig, ModelConfig
from sltrain_dist.model.llama import Llama
from sltrain_dist.model.tensor_parallel import check_tensor_parallel
from sltrain_dist.params import count_parameters

SIZES = {  # hidden, MLP width, layers, heads
    "9m": (128, 352, 4, 4),
    "20m": (256, 688, 4, 4),
    "35m": (384, 1024, 6, 8),
    "60m": (512, 1376, 8, 8),
    "71m": (512, 1368, 12, 8),
    "100m": (640, 1708, 12, 10),
    "130m": (768, 2048, 12, 12),
    "250m": (768, 2560, 24, 16),
    "350m": (1024, 2736, 24, 16),
    "1b": (2048, 5461, 24, 32),
    "3b": (2560, 6848, 32, 32),
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
    "demo": (128, 352, 4, 4),
}
PARAMETERS = {  # millions: full rank, SLTrain with (rank, density) of the published recipe
    "60m": (58.1, 43.5, 128, 0.03),
    "130m": (134.1, 96.5, 256, 0.03),
    "350m": (368.0, 194.3, 256, 0.03),
    "1b": (1339.1, 645.5, 512, 0.03),
    "7b": (6738.4, 3144.7, 1024, 0.05),
}


def test_all_presets_are_listed() -> None:
    assert {f"llama_{name}" for name in SIZES} == set(ModelConfig.presets())


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    config = ModelConfig.load(name)
    assert (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
    ) == SIZES[name]
    assert config.num_key_value_heads == config.num_attention_heads
    assert config.vocab_size == {"100m": 32100, "demo": 8192}.get(name, 32000)
    assert config.max_position_embeddings == (2048 if name in ("7b", "13b") else 1024)
    assert (config.rms_norm_eps, config.initializer_range) == (1e-6, 0.02)
    assert (config.bos_token_id, config.eos_token_id) == (0, 1)
    assert not config.tie_word_embeddings
    raw = json.loads((PRESETS / f"llama_{name}.json").read_text())
    assert (raw["model_type"], raw["hidden_act"], raw["pad_token_id"]) == ("llama", "silu", -1)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_of_the_published_table(name: str) -> None:
    full, sltrain, rank, density = PARAMETERS[name]
    config = ModelConfig.load(name)
    counted = count_parameters(Llama(config, MethodConfig(method="full")))["total"]
    assert counted / 1e6 == pytest.approx(full, rel=1e-3)
    method = MethodConfig(rank=rank, density=density, support="uniform")
    counted = count_parameters(Llama(config, method))["total"]
    assert counted / 1e6 == pytest.approx(sltrain, rel=1e-3)


@pytest.mark.parametrize("density", [0.03, 0.05])
@pytest.mark.parametrize("name", ModelConfig.presets())
def test_presets_can_be_cut(name: str, density: float) -> None:
    """docs/parallelism.md: all presets over 2 tensor-parallel ranks, from 1b on over 8."""
    config = ModelConfig.load(name)
    method = MethodConfig(rank=config.hidden_size // 4, density=density)
    large = name in ("llama_1b", "llama_3b", "llama_7b", "llama_13b")
    check_tensor_parallel(Llama(config, method), 8 if large else 2)
