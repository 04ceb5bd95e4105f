"""The model under the hooks of real engines: its tied head, padding, checkpointing and loss survive.

Here are only torch's and DeepSpeed's own calls, no code of ours from parallel/ but the process group:
a failure points at the model (a parameter used outside its module, a saved view of a gathered
weight, a buffer), not at an engine.
"""

import importlib.util
import logging
from typing import Any

import pytest
import torch

from sltrain_dist.config import MethodConfig, ModelConfig
from sltrain_dist.model.llama import Llama
from sltrain_dist.parallel import zero
from sltrain_dist.params import collect_specs
from tests.model.small import SLTRAIN, batch, filled, initial_value, small
from tests.ranks import run_ranks

TIED = small(tie_word_embeddings=True, vocab_size=250, intermediate_size=107)
Result = tuple[float, dict[str, torch.Tensor]]


def single_process(config: ModelConfig, method: MethodConfig) -> Result:
    model = filled(config, method)
    loss = model(*batch(config))
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def under_fsdp2(mesh: Any, config: ModelConfig) -> list[Result]:
    """Meta model, sharded, materialised, tied again, filled; in float32 and in mixed precision."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import distribute_tensor

    results = []
    for dtype in (None, torch.bfloat16):
        model = Llama(config, SLTRAIN, checkpointing="block")
        specs = collect_specs(model)
        policy = MixedPrecisionPolicy(param_dtype=dtype)
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh.data_mesh, mp_policy=policy)
        model.to_empty(device="cpu")
        model.tie_weights()
        with torch.no_grad():
            for name, p in model.named_parameters():
                whole = initial_value(specs[name], name)
                p.copy_(distribute_tensor(whole, p.device_mesh, p.placements))
        loss = model(*batch(config))
        loss.backward()
        assert loss.dtype == torch.float32
        parameters = model.named_parameters()
        gradients = {n: p.grad.full_tensor() for n, p in parameters if p.grad is not None}
        results.append((loss.item(), gradients))
    return results


def under_zero3(mesh: Any, config: ModelConfig) -> Result:
    """Stage 3 with every parameter partitioned; the second update uses refreshed shards."""
    # The engine's own import: DeepSpeed by itself would compile a shared-memory all-reduce first.
    deepspeed = zero.load_deepspeed()
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo")
    model = filled(config, SLTRAIN, checkpointing="block")
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(trained, lr=1e-3),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        },
    )
    loss = engine(*batch(config))
    engine.backward(loss)
    gradients = {
        name: deepspeed.utils.safe_get_full_grad(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    engine.step()
    assert engine(*batch(config)).item() < loss.item()
    return loss.item(), gradients


def test_fsdp2_gives_the_gradients_of_one_process() -> None:
    expected_loss, expected = single_process(TIED, SLTRAIN)
    for exact, mixed in run_ranks(under_fsdp2, 2, TIED):
        assert exact[0] == pytest.approx(expected_loss, rel=1e-6)
        assert mixed[0] == pytest.approx(expected_loss, rel=2e-3)
        assert exact[1].keys() == mixed[1].keys() == expected.keys()
        for name, gradient in expected.items():  # both ranks had the same batch: mean = each
            assert gradient.any(), name
            torch.testing.assert_close(exact[1][name], gradient, rtol=1e-4, atol=1e-5)
            assert (mixed[1][name] - gradient).norm() < 0.05 * gradient.norm(), name


@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed")
def test_zero3_gives_the_gradients_of_one_process() -> None:
    expected_loss, expected = single_process(TIED, SLTRAIN)
    for loss, gradients in run_ranks(under_zero3, 2, TIED):
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
