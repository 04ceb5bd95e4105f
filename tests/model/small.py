"""Small LLaMA configs and a filled model: what the tests of this folder share."""

import dataclasses
from typing import Any

import torch

from sltrain_dist.config import MethodConfig, ModelConfig
from sltrain_dist.model.llama import Llama
from sltrain_dist.params import ParameterSpec, collect_specs
from sltrain_dist.params.initial import Random

FULL = MethodConfig(method="full")
LOW_RANK = MethodConfig(method="low_rank", rank=8)
SLTRAIN = MethodConfig(method="sltrain", rank=8, density=0.05, alpha=16.0)
SLOPE = MethodConfig(method="slope")
METHODS = [FULL, LOW_RANK, SLTRAIN, SLOPE]

SMALL = ModelConfig(
    name="small",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    max_position_embeddings=64,
)


def small(**changes: Any) -> ModelConfig:
    return dataclasses.replace(SMALL, **changes)


def filled(config: ModelConfig, method: MethodConfig = FULL, **settings: Any) -> Llama:
    """A CPU model with the initial values that an engine would write."""
    model = Llama(config, method, device="cpu", **settings)
    fill(model)
    return model


def fill(model: Llama, seed: int = 7) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, spec in collect_specs(model).items():
            parameter = parameters[name]
            parameter.copy_(initial_value(spec, name, seed))


def initial_value(spec: ParameterSpec, name: str, seed: int = 7) -> torch.Tensor:
    """The whole tensor an engine would write, but with a B that is not zero: A's gradient counts."""
    initial = spec.initial
    if isinstance(initial, Random) and initial.spread == 0:
        initial = dataclasses.replace(initial, spread=0.1)
    return initial.flat(seed, name, 0, torch.Size(spec.shape).numel()).view(spec.shape)


def batch(
    config: ModelConfig, rows: int = 2, length: int = 24
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and labels, some labels ignored."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, config.vocab_size, (rows, length + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, :5] = -100
    return tokens[:, :-1].contiguous(), labels
