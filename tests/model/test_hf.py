"""--use_hf_model: transformers' code around our parameters gives the same loss and gradients as our model."""

from dataclasses import replace

import pytest
import torch

from sltrain_dist.config import MethodConfig, ModelConfig
from sltrain_dist.model.hf import HFLlama
from sltrain_dist.model.llama import Llama
from sltrain_dist.params import collect_specs

CONFIG = ModelConfig(
    "small", 300, 64, 108, 2, 4, 2, 16, max_position_embeddings=64, rope_theta=5000.0
)


def filled(kind, config, method, **options):
    model = kind(config, method, device="cpu", **options)
    specs = collect_specs(model)
    for name, parameter in model.named_parameters():
        flat = specs[name].initial.flat(3, name, 0, parameter.numel())
        parameter.data.copy_(flat.view(parameter.shape))
    return model


@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}]
)
def test_equals_our_model(changes, checkpointing):
    config = replace(CONFIG, **changes)
    method = MethodConfig(rank=8, density=0.125)
    ours = filled(Llama, config, method)
    theirs = filled(HFLlama, config, method, checkpointing=checkpointing)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    tokens = torch.randint(300, (2, 20))
    labels = torch.randint(300, (2, 20))
    labels[0, :5] = -100
    torch.testing.assert_close(theirs(tokens), ours(tokens), atol=1e-5, rtol=1e-5)
    losses = [model.train()(tokens, labels) for model in (ours, theirs)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(other.grad, mine.grad, atol=1e-4, rtol=1e-4, msg=name)
