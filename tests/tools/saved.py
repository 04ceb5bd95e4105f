"""Checkpoints of tiny models that really trained: odd widths, and every kind of linear."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sltrain_dist.config import (
    DataConfig,
    EngineConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from sltrain_dist.parallel.mesh import Mesh
from sltrain_dist.train.checkpoint import Progress, save
from tests.parallel import tiny

MODEL = dataclasses.replace(
    tiny.MODEL,
    vocab_size=251,  # padded to 256
    intermediate_size=173,  # padded to 192, as 5461 is to 5472
    max_position_embeddings=64,
    initializer_range=0.06,
)
METHOD = MethodConfig(rank=8, density=0.1, alpha=8.0, seed=3, block_size=8)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# name: (changes of the model, changes of the method)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fan_in": ({}, {}),
    "uniform": ({"attention_bias": True, "mlp_bias": True}, {"support": "uniform"}),
    "block": ({"num_key_value_heads": 4}, {"support": "block", "density": 0.125}),
    "trained_scale": ({"tie_word_embeddings": True}, {"train_scaling": True}),
    "uniform_trained_scale": ({"head_dim": 24}, {"support": "uniform", "train_scaling": True}),
    "low_rank": ({"rope_scaling": LLAMA3, "rope_theta": 500000.0}, {"method": "low_rank"}),
    "low_rank_trained_scale": (
        {"mlp_bias": True},
        {"method": "low_rank", "train_scaling": True},
    ),
    "slope": ({"mlp_bias": True, "num_key_value_heads": 4}, {"method": "slope"}),
    "full": (
        {"tie_word_embeddings": True, "attention_bias": True, "rope_scaling": YARN},
        {"method": "full"},
    ),
}


def configs(case: str) -> tuple[ModelConfig, MethodConfig]:
    """The model and method of a case."""
    model, method = CASES[case]
    return dataclasses.replace(MODEL, **model), dataclasses.replace(METHOD, **method)


def tokens(count: int = 3, length: int = 24) -> Tensor:
    """Token ids [count, length]."""
    return torch.randint(250, (count, length), generator=torch.Generator().manual_seed(5))


def checkpoint(mesh: Mesh, run: Path, model: ModelConfig, method: MethodConfig) -> Tensor:
    """Train three updates, save ``run``/step_3, and give the engine's own logits of `tokens`."""
    engine = tiny.build(mesh, "fsdp", method=method, model=model)
    tiny.train(engine, 0, 3)
    config = TrainConfig(
        model, method, DataConfig(corpus="/nowhere"), OptimizerConfig(), EngineConfig(), save_dir=str(run)
    )  # fmt: skip
    assert save(engine, Progress(3, 3), config).folder is not None
    with torch.no_grad():
        logits: Tensor = engine.module.eval()(tokens())
    return logits
