"""What autograd keeps of one block for backward: every tensor, its bytes, and nothing twice.

Legend, elements a token:  D model width  Q = H Dh queries  KV keys (or values)  F padded MLP width  r rank  H heads

    none        4 D + 2 Q + 2 KV + 3 F     x, norm, x + attention, norm; q, attention; k, v; gate, up, product
    selective   2 D + 2 Q + 2 KV + 2 F     without the norms' outputs and the product
    block       D                          x
    and 7 r     h = x A^T of every linear, where it is kept (low_rank: s h)
    in float32  2 + H                      1 / rms of two norms, the log-sum of attention
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sltrain_dist.config import MethodConfig, ModelConfig
from sltrain_dist.model.llama import Llama
from sltrain_dist.model.rope import cos_sin
from sltrain_dist.params.linears import SLTrain
from tests.model.small import FULL, LOW_RANK, SLOPE, SLTRAIN, batch, filled, small

BLOCK = dataclasses.replace(SLTRAIN, support="block", block_size=4, density=0.125)
# name: (method, path, keep_hidden, whether r numbers a linear and token are kept)
CASES: dict[str, tuple[MethodConfig, str, bool | None, bool]] = {
    "full": (FULL, "composed", None, False),
    "slope": (SLOPE, "composed", None, False),
    "low_rank": (LOW_RANK, "composed", None, True),
    "composed": (SLTRAIN, "composed", None, False),
    "factorized, h kept": (SLTRAIN, "factorized", True, True),
    "factorized": (SLTRAIN, "factorized", False, False),
    "blocks composed": (BLOCK, "composed", None, False),
    "blocks factorized": (BLOCK, "factorized", False, False),
}
# grouped-query heads, queries wider than the model, a padded MLP
GROUPED = small(num_key_value_heads=2, head_dim=24, intermediate_size=107)
TOKENS = (2, 24)


def elements(config: ModelConfig, checkpointing: str, hidden: int) -> int:
    """Kept per token and block in the compute dtype; ``hidden``: r where h is kept, else 0."""
    d, f = config.hidden_size, config.padded_intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    return {
        "none": 4 * d + 2 * q + 2 * kv + 3 * f + 7 * hidden,
        "selective": 2 * d + 2 * q + 2 * kv + 2 * f + 7 * hidden,
        "block": d,
    }[checkpointing]


def prepared(config: ModelConfig, case: str, **settings: Any) -> Llama:
    method, path, keep, _ = CASES[case]
    model = filled(config, method, **settings)
    for module in model.modules():
        if isinstance(module, SLTrain):
            module.path, module.keep_hidden = path, keep  # type: ignore[assignment]
    return model


class Kept:
    """Tensors that a forward pass saves, but for those that share memory with ``known``."""

    def __init__(self, *known: Tensor) -> None:
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.tensors: list[Tensor] = []

    def __enter__(self) -> "Kept":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in self.known:
            self.tensors.append(tensor.detach())
        return tensor

    def storages(self) -> dict[int, Tensor]:
        """One tensor of every storage that is not empty now."""
        alive = [tensor for tensor in self.tensors if tensor.untyped_storage().nbytes()]
        return {tensor.untyped_storage().data_ptr(): tensor for tensor in alive}

    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.storages().values())


def one_block(config: ModelConfig, case: str, dtype: torch.dtype, checkpointing: str) -> tuple[Kept, Llama]:  # fmt: skip
    """What the first block keeps for a random input; the input is among it."""
    model = prepared(config, case, dtype=dtype, checkpointing=checkpointing)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(*TOKENS, config.hidden_size, generator=generator).to(dtype).requires_grad_()
    cos, sin = cos_sin(config, TOKENS[1], x.device, dtype)
    with Kept(*model.parameters(), cos, sin) as kept:
        y = model.blocks[0](x, cos, sin)
    assert y.requires_grad
    return kept, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", [small(), GROUPED], ids=["plain", "grouped_padded"])
@pytest.mark.parametrize("case", CASES)
def test_a_block_keeps_what_the_formula_says(
    case: str, config: ModelConfig, dtype: torch.dtype
) -> None:
    method, *_, has_hidden = CASES[case]
    for checkpointing in ("none", "selective"):
        kept, _ = one_block(config, case, dtype, checkpointing)
        wanted = elements(config, checkpointing, method.rank if has_hidden else 0)
        narrow = 4 * (2 + config.num_attention_heads)
        assert kept.bytes() == TOKENS[0] * TOKENS[1] * (wanted * dtype.itemsize + narrow)
        for tensor in kept.storages().values():  # products are computed in float32 on a CPU
            few = tensor.numel() <= TOKENS[0] * TOKENS[1] * config.num_attention_heads
            assert tensor.dtype == dtype or few, tensor.shape


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_kept_twice_and_no_parameter_is_copied(case: str) -> None:
    kept, model = one_block(small(), case, torch.float32, "none")
    storages = list(kept.storages().values())
    known = [p.detach() for p in model.parameters() if p.is_floating_point() and p.numel() > 1]
    for index, tensor in enumerate(storages):
        for other in storages[:index]:
            assert not _multiple(tensor, other), (tensor.shape, other.shape)
        for parameter in known:
            assert not _multiple(tensor, parameter), (tensor.shape, parameter.shape)


def _multiple(one: Tensor, other: Tensor) -> bool:
    """Whether one is the other times a number, in whatever order of dimensions."""
    if one.numel() != other.numel():
        return False
    first, second = (t.double().flatten().abs().sort().values for t in (one, other))
    return torch.allclose(first * second[-1], second * first[-1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", ["full", "composed", "factorized, h kept"])
def test_bytes_a_layer_of_each_kind_of_checkpointing(case: str) -> None:
    """Of a whole decoder: what two more layers add, printed as docs/design.md has it."""
    method, *_, has_hidden = CASES[case]
    tokens, _ = batch(small(), *TOKENS)
    hidden = method.rank if has_hidden else 0
    for checkpointing in ("none", "selective", "block"):
        totals = []
        for layers in (2, 4):
            config = small(num_hidden_layers=layers)
            model = prepared(config, case, checkpointing=checkpointing)
            with Kept(*model.parameters()) as kept:
                model.model(tokens)
            totals.append(kept.bytes())
        wanted = elements(config, checkpointing, hidden) * 4
        wanted += 0 if checkpointing == "block" else 4 * (2 + config.num_attention_heads)
        assert (totals[1] - totals[0]) / 2 == tokens.numel() * wanted, checkpointing


def test_forgotten_outputs_end_with_backward() -> None:
    """Although the graph's nodes live on: the loss is still there."""
    model = prepared(small(), "full", checkpointing="selective")
    with Kept(*model.parameters()) as kept:
        loss = model(*batch(small()))
    watched = [StorageWeakRef(tensor.untyped_storage()) for tensor in kept.tensors]
    empty = sum(not tensor.untyped_storage().nbytes() for tensor in kept.tensors)
    assert empty >= 3 * len(model.blocks)
    kept.tensors.clear()
    loss.backward()
    assert loss.grad_fn is not None
    assert all(reference.expired() for reference in watched)


def test_a_kept_graph_gives_the_same_gradients_twice() -> None:
    model = prepared(small(), "full", checkpointing="selective")
    tokens, _ = batch(small())
    loss = model.model(tokens).square().sum()
    trained = list(model.model.parameters())
    first = torch.autograd.grad(loss, trained, retain_graph=True)
    again = torch.autograd.grad(loss, trained)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_nothing_is_forgotten_without_gradient() -> None:
    kept, forgetful = (
        prepared(small(), "full", checkpointing=kind) for kind in ("none", "selective")
    )
    tokens, _ = batch(small())
    with torch.no_grad():
        assert torch.equal(kept(tokens), forgetful(tokens))
