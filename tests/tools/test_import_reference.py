"""Folders as the reference implementation writes them, built here from its formula, in both formats."""

import dataclasses
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from launcher import export, import_weights
from sltrain_dist.config import TrainConfig
from sltrain_dist.tools.weights import Pretrained, load_model, merge, open_pretrained
from sltrain_dist.train.init_from import check_start
from sltrain_dist.utils.errors import UserError
from tests.tools.saved import tokens
from tests.train.fake_engine import make_config

transformers = pytest.importorskip("transformers")

R, ALPHA, SP_RATIO = 6, 16, 0.29
LLAMA = {
    "vocab_size": 251,
    "hidden_size": 60,
    "intermediate_size": 173,  # padded to 192 here: indices of down_proj move
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
Folder = tuple[dict[str, Tensor], dict[str, Any], Any]


def reference(trained_scale: bool, bias: bool = False) -> Folder:
    """(tensors, splora_config, transformers' model with W by the formula)."""
    config = transformers.LlamaConfig(**LLAMA, attention_bias=bias)
    torch.manual_seed(7)
    model = transformers.LlamaForCausalLM(config).eval()
    tensors = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if not (".self_attn." in name or ".mlp." in name) or leaf == "bias":
            parameter.data += 0.1 * torch.randn_like(parameter)
            tensors[name] = parameter.data
            continue
        out, in_ = parameter.shape
        index = torch.randperm(out * in_)[: int(SP_RATIO * (out * in_))].sort().values
        b, a = 0.05 * torch.randn(out, R), 0.3 * torch.randn(R, in_)
        value = 0.1 * torch.randn(len(index))
        scaling = torch.randn(1).abs() + 0.3
        scale = scaling.tanh() if trained_scale else ALPHA / R
        w = (b @ (a * scale)).flatten()
        w[index] += value
        parameter.data = w.view(out, in_)
        parts = {"lora_A": a, "lora_B": b, "sparse_index": index, "sparse_value": value}
        if trained_scale:
            parts["scaling"] = scaling
        tensors |= {f"{owner}.{part}": tensor for part, tensor in parts.items()}
    options = {
        "r": R,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "sp_ratio": SP_RATIO,
        "target_modules": ["attn", "mlp", "attention"],
        "trainable_scaling": False,  # whatever was trained: so does the reference
    }
    return tensors, options, model


def write(folder: Path, content: Folder, form: str = "safetensors", prefix: str = "") -> Path:
    tensors, options, model = content
    folder.mkdir()
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    if form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    model.config.save_pretrained(folder)
    (folder / "splora_config.json").write_text(json.dumps(options))
    return folder


@pytest.mark.parametrize("trained_scale", [False, True])
@pytest.mark.parametrize(
    ("form", "prefix"),
    [("bin", ""), ("safetensors", ""), ("bin", "module."), ("bin", "module.wrapped_model.")],
)
@torch.no_grad()
def test_logits_equal_the_formula(
    trained_scale: bool, form: str, prefix: str, tmp_path: Path
) -> None:
    content = reference(trained_scale, bias=trained_scale)
    tensors, _, model = content
    source = write(tmp_path / "source", content, form, prefix)
    out = tmp_path / "out"
    assert import_weights.main([str(source), "--from", "auto", "--output", str(out)]) == 0
    got = open_pretrained(out, "--model")
    assert (got.method.support, got.generated) == ("uniform", False)
    assert got.method.train_scaling == trained_scale
    expected = model(tokens()).logits
    assert expected.std() > 0.3
    for merged in (False, True):
        assert (load_model(got, merged=merged)(tokens()) - expected).abs().max() < 1e-5
    # every number is the reference's own, bit for bit, and stands at the reference's own position
    dense = merge(got)
    for name, parameter in model.named_parameters():
        inside = tuple(slice(0, size) for size in parameter.shape)
        w = dense.tensor(name)
        torch.testing.assert_close(w[inside], parameter.data, rtol=0, atol=5e-7)
        w[inside] = 0
        assert not w.any()  # padding
    for name in (f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")):
        assert torch.equal(got.tensor(f"{name}.values"), tensors[f"{name}.sparse_value"])
        in_ = tensors[f"{name}.lora_A"].shape[1]
        assert torch.equal(got.tensor(f"{name}.a")[:, :in_], tensors[f"{name}.lora_A"])


@torch.no_grad()
def test_through_to_transformers(tmp_path: Path) -> None:
    """reference -> factored -> hf, and a factored folder of a factored one: positions stay the folder's."""
    content = reference(True)
    source = write(tmp_path / "source", content)
    factored, again, hf = (tmp_path / name for name in ("factored", "again", "hf"))
    assert import_weights.main([str(source), "--output", str(factored)]) == 0
    assert export.main([str(factored), "--to", "factored", "--output", str(again)]) == 0
    assert export.main([str(again), "--to", "hf", "--output", str(hf)]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype="auto")
    assert (theirs(tokens()).logits - content[2](tokens()).logits).abs().max() < 1e-5
    assert not open_pretrained(again, "--model").generated


def test_training_from_it_needs_a_support_of_ours(tmp_path: Path) -> None:
    """Refused in one line; what the line says gives a folder that a run can start from."""
    source = write(tmp_path / "source", reference(True))
    factored, ours = tmp_path / "factored", tmp_path / "ours"
    assert import_weights.main([str(source), "--output", str(factored)]) == 0
    imported = open_pretrained(factored, "--init_from")

    def config(start: Pretrained) -> TrainConfig:
        same = dataclasses.replace(make_config("unused"), model=start.model, method=start.method)
        return dataclasses.replace(same, init_from=str(start.path))

    with pytest.raises(UserError, match=r"^--init_from .*import_weights.py --method sltrain$"):
        check_start(imported, config(imported))
    flags = "--method sltrain --support uniform --rank 24 --sp_ratio 0.3".split()
    assert import_weights.main([str(factored), "--output", str(ours), *flags]) == 0
    converted = open_pretrained(ours, "--init_from")
    check_start(converted, config(converted))
    assert converted.generated


def q(part: str, layer: int = 1) -> str:
    return f"model.layers.{layer}.self_attn.q_proj.{part}"


def unsorted(content: Folder) -> None:
    index = content[0][q("sparse_index")]
    index[[3, 4]] = index[[4, 3]]


def twice(content: Folder) -> None:
    index = content[0][q("sparse_index")]
    index[4] = index[3]


def change(part: str, make: Callable[[Tensor], Tensor]) -> Callable[[Folder], None]:
    def spoil(content: Folder) -> None:
        content[0][q(part)] = make(content[0][q(part)])

    return spoil


def outside(index: Tensor) -> Tensor:
    return torch.cat((index[:-1], torch.tensor([64 * 60])))


def left_dense(content: Folder) -> None:
    for part in ("lora_A", "lora_B", "sparse_index", "sparse_value"):
        del content[0][q(part)]
    content[0][q("weight")] = torch.zeros(64, 60)


SPOILED: dict[str, tuple[Callable[[Folder], Any], str]] = {
    "unsorted": (unsorted, f"tensor {q('sparse_index')} is not sorted"),
    "twice": (twice, f"tensor {q('sparse_index')} is not sorted, or a position stands in it twice"),
    "outside": (change("sparse_index", outside), "points outside its 64 x 60 matrix"),
    "negative": (change("sparse_index", lambda i: torch.cat((-i[:1] - 1, i[1:]))), "points outside"),
    "int32": (change("sparse_index", Tensor.int), "is torch.int32, not int64"),
    "fewer_values": (change("sparse_value", lambda v: v[:-1]), f"tensor {q('values')} is [1112]"),
    "transposed": (change("lora_A", lambda a: a.T), f"tensor {q('a')} is [60, 6]; by config.json and"),
    "integer_values": (change("lora_B", Tensor.long), "not floating point"),
    "missing": (lambda c: c[0].pop(q("lora_B")), f"tensor {q('b')} missing"),
    "left_over": (lambda c: c[0].update(extra=torch.zeros(1)), "tensor extra left over"),
    "left_dense": (left_dense, "q_proj is a dense linear there (target_modules ['attn'"),
    "other_rank": (lambda c: c[1].update(r=7), "q_proj.b is [64, 6]; by"),
    "other_ratio": (lambda c: c[1].update(sp_ratio=0.3), "values is [1113]; by"),
    "no_rank": (lambda c: c[1].pop("r"), "splora_config.json: r is None; it must be a positive integer"),
    "other_model": (lambda c: setattr(c[2].config, "num_hidden_layers", 3), "and 29 more missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_what_is_wrong_is_named_before_anything_is_written(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = SPOILED[case]
    content = reference(False)
    spoil(content)
    source, out = write(tmp_path / "source", content), tmp_path / "out"
    assert import_weights.main([str(source), "--output", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: SOURCE {source}: ")
    assert error.count("\n") == 1
    assert message in error
    assert not out.exists()


class Touch:
    """Unpickling this creates a file: what a loader that trusts pickles would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_bin_is_refused_and_not_run(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, trap = reference(False), tmp_path / "trap"
    source = write(tmp_path / "source", content, "bin")
    document = {**content[0], "extra": Touch(trap)}
    if form == "pickle":
        (source / "pytorch_model.bin").write_bytes(pickle.dumps(document, protocol=2))
    else:
        torch.save(
            document, source / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip"
        )
    assert import_weights.main([str(source), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pickled objects that are no tensors, which are never loaded" in error
    assert not trap.exists()


def test_an_old_bin_is_read(tmp_path: Path) -> None:
    """The format before torch 1.6, which cannot be mapped into memory."""
    content = reference(False)
    source = write(tmp_path / "source", content, "bin")
    torch.save(content[0], source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert import_weights.main([str(source), "--output", str(tmp_path / "out")]) == 0


def test_a_bin_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = reference(False)
    source = write(tmp_path / "source", content, "bin")
    for document, message in (
        ([1, 2], "holds a list, not tensors by name"),
        ({"step": 3}, "'step' is a int, not a tensor"),
    ):
        torch.save(document, source / "pytorch_model.bin")
        assert import_weights.main([str(source), "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    (source / "pytorch_model.bin").write_bytes(b"not a file of tensors")
    assert import_weights.main([str(source), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_our_flags_do_not_fit_a_reference_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "source", reference(False))
    command = [str(source), "--output", str(tmp_path / "out"), "--rank", "8"]
    assert import_weights.main(command) == 2
    assert "--rank 8: a reference checkpoint has its own" in capsys.readouterr().err
    assert export.main([str(source), "--to", "hf", "--output", str(tmp_path / "out")]) == 2
    assert "convert it with launcher/import_weights.py" in capsys.readouterr().err
