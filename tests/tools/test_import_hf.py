"""Dense LLaMA weights in: read as transformers wrote them, or factorised into s * B A + S."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import import_weights
from sltrain_dist.config import MethodConfig
from sltrain_dist.params.linears import make_linear
from sltrain_dist.tools.import_hf import (
    best_low_rank,
    decompose,
    factorize,
    nearer_low_rank,
    split,
)
from sltrain_dist.tools.weights import load_model, merge, open_pretrained
from sltrain_dist.train.parameter_names import whole_offsets
from tests.tools.saved import LLAMA3, tokens

transformers = pytest.importorskip("transformers")

BASE = {
    "vocab_size": 251,
    "hidden_size": 64,
    "intermediate_size": 173,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.08,
    "pad_token_id": None,
}
CASES: dict[str, dict[str, Any]] = {
    "grouped_queries_tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "biases_rope": {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {**LLAMA3, "rope_theta": 500000.0},
    },
}


def llama(**changes: Any) -> Any:
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**BASE, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def logits_of(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(open_pretrained(folder, "--model"))(tokens())


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["safetensors", "shards", "bin", "bin_shards"])
def test_dense_weights_keep_their_logits(case: str, form: str, tmp_path: Path) -> None:
    model = llama(**CASES[case])
    source = tmp_path / "source"
    model.save_pretrained(source, max_shard_size="200KB" if form == "shards" else "5GB")
    if form.startswith("bin"):
        (source / "model.safetensors").unlink()
        state = model.state_dict()
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # of old versions
        if form == "bin":
            torch.save(state, source / "pytorch_model.bin")
        else:
            half = len(state) // 2
            parts = {"a.bin": list(state)[:half], "b.bin": list(state)[half:]}
            for file, names in parts.items():
                torch.save({name: state[name] for name in names}, source / file)
            weight_map = {name: file for file, names in parts.items() for name in names}
            index = source / "pytorch_model.bin.index.json"
            index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    out = tmp_path / "out"
    assert import_weights.main([str(source), "--from", "hf", "--output", str(out)]) == 0
    expected = model(tokens()).logits
    for folder in (source, out):
        assert (logits_of(folder) - expected).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("support", ["fan_in", "uniform", "block", None])
def test_an_exact_factorisation_is_found(support: str | None, tmp_path: Path) -> None:
    """W that is s * B A + S on our support comes back, far below what either part alone could do."""
    method = MethodConfig(
        "sltrain" if support else "low_rank", rank=6, density=0.125, block_size=8, alpha=3.0
    )
    method = dataclasses.replace(method, support=support or "fan_in")
    linear: Any = make_linear("l", 96, 64, method=method, logical_out=90)
    generator = torch.Generator().manual_seed(2)
    b, a = torch.randn(96, 6, generator=generator), torch.randn(6, 64, generator=generator)
    b[90:] = 0
    w = 0.5 * b @ a
    low_rank = w.clone()
    offsets = None
    if support:
        offsets = whole_offsets(linear.specs["offsets"], method.seed, "l.offsets")
        values = torch.randn(linear.support.values_shape, generator=generator)
        values *= linear.support.inside(method.seed, "l", 0, values.numel()).view(values.shape)
        tiles = linear.support.tiles
        torch.ops.sltrain_dist.add_support(
            w, values, offsets, tiles.tile_out, tiles.tile_in, tiles.block
        )
    parts, missed = decompose(w, linear, offsets)
    size = float(w.double().square().sum())
    sparse_part = float((w - low_rank).double().square().sum())
    assert missed / size < (1e-10 if support is None else 0.05 * sparse_part / size)
    assert not parts["b"][90:].any()  # padding
    sizes = parts["b"].norm(dim=0), parts["a"].norm(dim=1)
    torch.testing.assert_close(*sizes, rtol=1e-4, atol=0)  # balanced


@torch.no_grad()
def test_best_low_rank_is_the_truncated_svd() -> None:
    for shape in ((40, 24), (24, 40)):
        m = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        left, right = best_low_rank(m, 7)
        u, sigma, v = torch.linalg.svd(m.double(), full_matrices=False)
        expected = ((u[:, :7] * sigma[:7]) @ v[:7]).float()
        torch.testing.assert_close(left @ right.T, expected, rtol=1e-4, atol=1e-5)
        b, a = split(left, right, 0.25)
        torch.testing.assert_close(0.25 * b @ a, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(0.25 * b.norm(dim=0) ** 2, sigma[:7].float())
        torch.testing.assert_close(0.25 * a.norm(dim=1) ** 2, sigma[:7].float())
        nearer, turned = nearer_low_rank(m, torch.linalg.qr(torch.randn(shape[1], 7)).Q)
        for _ in range(200):
            nearer, turned = nearer_low_rank(m, turned)
        torch.testing.assert_close(nearer @ turned.T, expected, rtol=1e-3, atol=1e-3)
    b, a = split(*best_low_rank(torch.zeros(8, 6), 2), 1.0)
    assert not b.any()
    assert a.norm(dim=1).min() > 0  # a pair of zeros would never learn


@torch.no_grad()
def test_sltrain_of_a_llama(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trainable from our own support; more rank and density miss less; what is printed is the real error."""
    model = llama(**CASES["biases_rope"])
    model.save_pretrained(tmp_path / "source")
    wanted = merge(open_pretrained(tmp_path / "source", "--model"))
    totals = []
    for rank, density in ((8, 0.05), (32, 0.1), (64, 0.1)):
        out = tmp_path / f"rank{rank}"
        flags = f"--method sltrain --rank {rank} --sp_ratio {density} --lora_alpha 8 --seed 3"
        command = [str(tmp_path / "source"), "--output", str(out), *flags.split()]
        assert import_weights.main(command) == 0
        printed = capsys.readouterr().out
        got = open_pretrained(out, "--model")
        assert got.generated
        assert (got.method.method, got.method.rank, got.method.seed) == ("sltrain", rank, 3)
        missed = whole = 0.0
        for name in wanted.names():
            if name.endswith("_proj.weight"):
                w = wanted.tensor(name)
                missed += float((merge(got).tensor(name) - w).square().sum())
                whole += float(w.square().sum())
            else:
                assert torch.equal(got.tensor(name), wanted.tensor(name))
        totals.append((missed / whole) ** 0.5)
        assert f"error       {totals[-1]:.4f} total" in printed
        assert "down_proj" in printed
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < 1e-5  # full rank


def test_rounds_never_raise_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from sltrain_dist.tools import import_hf

    method = MethodConfig(rank=4, density=0.1, alpha=4.0)
    linear: Any = make_linear("l", 64, 48, method=method)
    offsets = whole_offsets(linear.specs["offsets"], method.seed, "l.offsets")
    w = torch.randn(64, 48, generator=torch.Generator().manual_seed(4))
    errors = []
    for rounds in range(1, 7):
        monkeypatch.setattr(import_hf, "ROUNDS", rounds)
        errors.append(decompose(w, linear, offsets)[1])
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < errors[0]


def test_a_rank_too_large_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    from sltrain_dist.utils.errors import UserError

    llama().save_pretrained(tmp_path / "source")
    source = open_pretrained(tmp_path / "source", "--model")
    with pytest.raises(UserError, match="--rank 65"):
        factorize(source, MethodConfig(rank=65))


REFUSED: dict[str, tuple[Any, str]] = {
    "no_weights": (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
    "no_config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "not_llama": (
        lambda f: (f / "config.json").write_text(json.dumps({**BASE, "model_type": "gpt2"})),
        "model_type is 'gpt2'",
    ),
    "other_width": (
        lambda f: change_config(f, vocab_size=300),
        r"model.embed_tokens.weight is \[251, 64\]; by config.json \[300, 64\]",
    ),
    "more_layers": (
        lambda f: change_config(f, num_hidden_layers=3),
        r"tensor model.layers.2.self_attn.q_proj.weight and 8 more missing",
    ),
    "fewer_layers": (
        lambda f: change_config(f, num_hidden_layers=1),
        r"tensor model.layers.1.* and 8 more left over",
    ),
    "cut_off": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-100]
        ),
        "model.safetensors: not readable",
    ),
    "missing_shard": (
        lambda f: (
            (f / "model.safetensors").unlink(),
            (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}'),
        ),
        "gone.safetensors: missing",
    ),
    "outside_shard": (
        lambda f: (
            (f / "model.safetensors").unlink(),
            (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../secret"}}'),
        ),
        "no file of this folder",
    ),
}  # fmt: skip


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "whole"
    llama().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(
    case: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(whole, source)
    spoil, message = REFUSED[case]
    spoil(source)
    assert import_weights.main([str(source), "--output", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"SOURCE {source}" in error
    assert re.search(message, error), error
    assert not out.exists()


def test_flags_that_do_not_go_together(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, message in (
        ("--rank 8", "--rank 8: dense weights have none; add --method sltrain"),
        ("--method sltrain --rank 0", "--rank 0: must be positive"),
        ("--method sltrain --sp_ratio 2", "--sp_ratio 2.0"),
        ("--from reference", "splora_config.json: not readable"),
        ("--method low_rank --support block", "--support block: is of S, which --method low_rank"),
        ("--support triangle", "--support"),
    ):
        command = [str(whole), "--output", str(tmp_path / "out"), *flags.split()]
        assert import_weights.main(command) == 2
        assert message in capsys.readouterr().err
