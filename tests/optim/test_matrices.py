"""Optimizers that treat matrices of linears by themselves: muon, galore_adamw, apollo."""

import importlib
import sys
from typing import Any

import pytest
import torch
from torch import nn

from sltrain_dist.config import OptimizerConfig
from sltrain_dist.optim import OptimizerFactory
from sltrain_dist.parallel.engine import Trained, grouped
from sltrain_dist.utils.errors import UserError

RANK, GAP = 4, 3
NAMES = ("muon", "galore_adamw", "apollo")
PACKAGES = {"galore_adamw": "galore_torch", "apollo": "apollo_torch"}
PARAMETERS = {
    "model.embed_tokens.weight": (16, 6),
    "model.layers.0.self_attn.q_proj.weight": (12, 8),
    "model.layers.0.mlp.down_proj.weight": (6, 10),
    "model.layers.0.self_attn.q_proj.values": (8, 2, 1, 1),
    "model.norm.weight": (6,),
    "lm_head.weight": (16, 6),
}
MATRICES = [name for name in PARAMETERS if ".layers." in name and name.endswith("weight")]


def _parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in PARAMETERS.items()
    }


def _config(name: str) -> OptimizerConfig:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    return OptimizerConfig(name=name, lr=0.01, weight_decay=0.1, proj_rank=RANK, update_proj_gap=GAP)  # fmt: skip


def _built(name: str, parameters: dict[str, nn.Parameter], updates: int = 0) -> Any:
    factory = OptimizerFactory(_config(name))
    optimizer = factory.build([Trained(n, p, p.numel()) for n, p in parameters.items()])
    factory.begin(optimizer, grouped(optimizer), updates)
    return factory, optimizer


def _run(optimizers: list[Any], parameters: dict[str, nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def _reference(name: str, parameters: dict[str, nn.Parameter]) -> list[Any]:
    """As the packages say it is to be set up, with state that appears in the first update."""
    matrices = [parameters[n] for n in MATRICES]
    others = [p for n, p in parameters.items() if n not in MATRICES]
    if name == "muon":
        return [
            torch.optim.Muon(matrices, 0.01, 0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, 0.01, weight_decay=0.1),
        ]
    package = importlib.import_module(PACKAGES[name])
    projection = {"rank": RANK, "update_proj_gap": GAP, "proj_type": "std"}
    if name == "galore_adamw":
        groups = [{"params": others}, {"params": matrices, "scale": 0.25, **projection}]
        return [package.GaLoreAdamW(groups, 0.01, eps=1e-8, weight_decay=0.1, no_deprecation_warning=True)]  # fmt: skip
    random = {"proj": "random", "scale_type": "channel", "scale": 1.0}
    groups = [{"params": others}, {"params": matrices, **random, **projection}]
    return [package.APOLLOAdamW(groups, 0.01, eps=1e-8, weight_decay=0.1)]


@pytest.mark.parametrize("name", NAMES)
def test_it_updates_as_the_package_itself(name: str) -> None:
    ours, theirs = _parameters(), _parameters()
    _, optimizer = _built(name, ours)
    _run([optimizer], ours, 0, 8)
    _run(_reference(name, theirs), theirs, 0, 8)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=2e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("updates", [1, GAP, GAP + 1])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_all_that_it_takes_to_go_on(name: str, updates: int) -> None:
    through, stopped = _parameters(), _parameters()
    _, optimizer = _built(name, through)
    _run([optimizer], through, 0, updates + 5)
    factory, optimizer = _built(name, stopped)
    _run([optimizer], stopped, 0, updates)
    saved = {
        n: {k: v.clone() for k, v in factory.tensors(optimizer, p).items()}
        for n, p in stopped.items()
    }
    factory, optimizer = _built(name, stopped, updates)
    for key, parameter in stopped.items():
        tensors = factory.tensors(optimizer, parameter)
        assert tuple(tensors) == factory.state_names(key, PARAMETERS[key])
        assert tensors.keys() == saved[key].keys()
        for state, tensor in tensors.items():
            tensor.copy_(saved[key][state])
    _run([optimizer], stopped, updates, updates + 5)
    for key in through:
        assert torch.equal(through[key], stopped[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_it_is_refused_on_shards(name: str) -> None:
    with pytest.raises(UserError, match=f"--optimizer {name}: needs whole matrices, but ZeRO"):
        OptimizerFactory(_config(name)).check("ZeRO stage 2", sharded=True)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sltrain_dist.optim.packages import package_row

    package_row.__globals__["_projected_row"].cache_clear()
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    wanted = f"--optimizer {name}: {PACKAGES[name]} does not import .* pip install {PACKAGES[name].replace('_', '-')}"
    with pytest.raises(UserError, match=wanted):
        OptimizerFactory(OptimizerConfig(name=name))


def test_a_projection_saves_state() -> None:
    parameters = _parameters()
    factory, optimizer = _built("galore_adamw", parameters)
    name = MATRICES[0]
    shapes = {k: tuple(v.shape) for k, v in factory.tensors(optimizer, parameters[name]).items()}
    assert shapes == {"exp_avg": (12, RANK), "exp_avg_sq": (12, RANK), "projection": (RANK, 8)}
