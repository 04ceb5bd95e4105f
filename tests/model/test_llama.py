"""The model's contract: loss against logits, padding, checkpointing, dtypes, meta, ties, specs."""

import dataclasses

import pytest
import torch
from torch.nn import functional

from sltrain_dist.config import MethodConfig, ModelConfig
from sltrain_dist.model.llama import Llama
from sltrain_dist.model.rope import cos_sin
from sltrain_dist.params import collect_specs, count_parameters
from sltrain_dist.utils.errors import UserError
from tests.model.small import FULL, METHODS, SLTRAIN, SMALL, batch, fill, filled, small

PADDED = small(vocab_size=201, intermediate_size=107)


def gradients(model: Llama) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
@pytest.mark.parametrize("config", [SMALL, PADDED], ids=["even", "padded"])
def test_loss_is_the_fp32_sum_over_valid_labels(config: ModelConfig, method: MethodConfig) -> None:
    model = filled(config, method)
    tokens, labels = batch(config)
    loss = model(tokens, labels)
    logits = model(tokens)
    assert logits.shape == (*tokens.shape, config.vocab_size)
    expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert loss.dtype == torch.float32
    assert loss.shape == ()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
def test_training_keeps_padding_zero_and_reaches_every_parameter(method: MethodConfig) -> None:
    model = filled(PADDED, method)
    tokens, labels = batch(PADDED)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    losses = []
    for _ in range(4):
        loss = model(tokens, labels) / (labels >= 0).sum()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        untouched = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert untouched == []
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    assert not model.lm_head.weight[201:].any()
    assert not model.model.embed_tokens.weight[201:].any()
    mlp = model.blocks[0].mlp
    x = torch.randn(1, 3, 64)
    assert not mlp.gate_proj(x)[..., 107:].any()
    assert not mlp.up_proj(x)[..., 107:].any()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
def test_checkpointing_changes_neither_names_nor_gradients(method: MethodConfig) -> None:
    method = dataclasses.replace(method, dropout=0.1)
    tokens, labels = batch(SMALL)
    results = []
    for checkpointing in ("none", "block", "selective"):
        model = filled(SMALL, method, checkpointing=checkpointing)
        torch.manual_seed(5)
        model(tokens, labels).backward()
        results.append(gradients(model))
    assert list(results[0]) == list(results[1]) == list(results[2])
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name
        assert torch.equal(results[2][name], expected), name


def test_checkpointing_keeps_one_tensor_per_block() -> None:
    """Saved activations must not grow with what is inside a block."""

    def saved_elements(checkpointing: str) -> int:
        model = filled(small(num_hidden_layers=4), checkpointing=checkpointing)
        owned = {p.data_ptr() for p in model.parameters()}
        found: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in owned:
                found[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(*batch(SMALL))
        assert loss.requires_grad
        return sum(found.values())

    assert saved_elements("block") < saved_elements("none") / 3


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
def test_meta_model_has_the_same_names_shapes_and_specs(method: MethodConfig) -> None:
    meta, real = Llama(PADDED, method), filled(PADDED, method)
    assert all(p.is_meta for p in meta.parameters())
    shapes = {name: (p.shape, p.dtype) for name, p in meta.named_parameters()}
    assert shapes == {name: (p.shape, p.dtype) for name, p in real.named_parameters()}
    specs = collect_specs(meta)
    assert {name: shape for name, (shape, _) in shapes.items()} == {
        name: torch.Size(spec.shape) for name, spec in specs.items()
    }
    assert list(meta.buffers()) == []  # DeepSpeed would not broadcast one
    assert len(meta.blocks) == PADDED.num_hidden_layers


def test_meta_then_materialised_equals_built_on_cpu() -> None:
    for config in (SMALL, small(tie_word_embeddings=True)):
        with torch.device("meta"):
            model = Llama(config, SLTRAIN)
        model.to_empty(device="cpu")
        model.tie_weights()
        fill(model)
        assert torch.equal(model(*batch(config)), filled(config, SLTRAIN)(*batch(config)))


def test_tied_head_is_the_embedding_and_counted_once() -> None:
    tied, apart = Llama(small(tie_word_embeddings=True), FULL), Llama(SMALL, FULL)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert "lm_head.weight" not in collect_specs(tied)
    saved = count_parameters(apart)["total"] - count_parameters(tied)["total"]
    assert saved == SMALL.vocab_size * SMALL.hidden_size


def test_bfloat16_stays_near_float32() -> None:
    tokens, labels = batch(SMALL, length=60)
    exact = filled(SMALL)
    half = filled(SMALL, dtype=torch.bfloat16)
    loss = half(tokens, labels)
    assert loss.dtype == torch.float32
    assert half(tokens).dtype == torch.bfloat16
    torch.testing.assert_close(loss, exact(tokens, labels), rtol=2e-3, atol=0)
    loss.backward()
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients(half).values())


def test_angles_are_computed_in_float32_whatever_the_dtype() -> None:
    """bfloat16 cannot count beyond 256: angles rounded to it would merge distant positions."""
    config = small(max_position_embeddings=4096)
    cos, sin = cos_sin(config, 4000, torch.device("cpu"), torch.bfloat16)
    exact_cos, exact_sin = cos_sin(config, 4000, torch.device("cpu"), torch.float32)
    assert cos.dtype == sin.dtype == torch.bfloat16
    assert torch.equal(cos, exact_cos.bfloat16())
    assert torch.equal(sin, exact_sin.bfloat16())


def test_causality() -> None:
    model = filled(SMALL)
    tokens, _ = batch(SMALL)
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % SMALL.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_type": "proportional"}}, "rope_type 'proportional'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}},
            "it needs head_dim / 2 = 8",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        Llama(small(**changes), FULL)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
def test_compiles_without_a_graph_break(method: MethodConfig) -> None:
    """Blocks are what gets compiled; names must stay and values agree."""
    model = filled(SMALL, method)
    tokens, labels = batch(SMALL)
    expected = model(tokens, labels)
    names = [name for name, _ in model.named_parameters()]
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(tokens, labels), expected)
    assert [name for name, _ in model.named_parameters()] == names
