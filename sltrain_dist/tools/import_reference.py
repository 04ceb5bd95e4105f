"""Checkpoint folders of SLTrain's reference implementation, read as our weights.

    config.json          HF's LLaMA                     splora_config.json   r, lora_alpha, sp_ratio, ...
    pytorch_model.bin or model.safetensors, with, for every linear of attention and MLP,
      lora_A [r, in]  lora_B [out, r]  sparse_value [k]  sparse_index [k]  (scaling [1])  (bias [out])

    W = s * lora_B lora_A + S,  s = lora_alpha / r, or tanh(scaling) where a scaling is stored

``sparse_index`` is int64, sorted, flat into [out, in], k = int(sp_ratio * (out * in)). That is our
support "uniform" but for who drew it: the folder's positions are kept, ours cannot make them again.
``trainable_scaling`` is not believed: the reference writes false whatever it trained. The tensors tell.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sltrain_dist.config import POSITIVE_INTEGER, POSITIVE_NUMBER, Kind, MethodConfig, ModelConfig
from sltrain_dist.model.llama import Llama
from sltrain_dist.params import ParameterizedLinear, partial_hash
from sltrain_dist.tools.weights import Pretrained
from sltrain_dist.train.parameter_names import check_names, is_ignored, logical_shape
from sltrain_dist.train.pretrained import CONFIG, open_tokenizer
from sltrain_dist.train.stored_tensors import StoredError, TensorFiles, open_weights
from sltrain_dist.utils.errors import UserError

SPLORA = "splora_config.json"
_WRAPPERS = ("module.", "wrapped_model.", "_orig_mod.")  # DDP, the reference's own, torch.compile
_PARTS = {"a": "lora_A", "b": "lora_B", "values": "sparse_value", "offsets": "sparse_index"}
_FIELDS: dict[str, Kind] = {
    "r": POSITIVE_INTEGER,
    "lora_alpha": POSITIVE_NUMBER,
    "sp_ratio": Kind(
        "a number between 0 and 1", lambda v: POSITIVE_NUMBER.holds(v) and v < 1
    ),
}  # fmt: skip


def open_reference(folder: Path, flag: str) -> Pretrained:
    """Open a folder of the reference; every index is checked, every other tensor by name and shape.

    Raises:
        UserError: files missing or not readable, tensors missing, left over or of another shape than the
            two configurations say, linears that were left dense, indices that are not sorted positions.
    """
    model = ModelConfig.load(str(folder), flag)
    try:
        options = _options(folder)
        files = open_weights(folder)
        stored = _plain_names(files)
        names = set(stored)
        method = MethodConfig(
            method="sltrain",
            rank=options["r"],
            density=float(options["sp_ratio"]),
            alpha=float(options["lora_alpha"]),
            train_scaling=any(name.endswith(".scaling") for name in names),
            support="uniform",
        )
        blank = Llama(model, method, device="meta")
        linears = {
            name: module
            for name, module in blank.named_modules()
            if isinstance(module, ParameterizedLinear)
        }
        _check_wrapped(linears, names, options)
        wanted = _wanted(blank, linears, method)
        found = {name: files.shapes[stored[name]] for name in stored}
        if model.tie_word_embeddings:
            found.pop("lm_head.weight", None)
        check_names(wanted, found, f"{CONFIG} and {SPLORA}")
        reader = _Reader(files, stored, wanted, blank, linears)
        support_hash = sum(
            partial_hash(method.seed, f"{name}.offsets", 0, reader.read(f"{name}.offsets"))
            for name in linears
        )
    except StoredError as error:
        raise UserError(f"{flag} {folder}: {error}") from None
    return Pretrained(
        "reference", folder, flag, model, method, open_tokenizer(folder), reader.shapes, False,
        support_hash % (1 << 64), reader.read,
    )  # fmt: skip


def _options(folder: Path) -> dict[str, Any]:
    try:
        options = json.loads((folder / SPLORA).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StoredError(f"{SPLORA}: not readable ({reason})") from None
    if not isinstance(options, dict):
        raise StoredError(f"{SPLORA}: no JSON object")
    for name, kind in _FIELDS.items():
        if not kind.holds(options.get(name)):
            raise StoredError(f"{SPLORA}: {name} is {options.get(name)!r}; it must be {kind.words}")
    return options


def _plain_names(files: TensorFiles) -> dict[str, str]:
    """Our name of every stored tensor -> its stored name: wrappers taken off, parts renamed."""
    ours = {theirs: part for part, theirs in _PARTS.items()}
    plain: dict[str, str] = {}
    for name in files.shapes:
        short = name
        while short.startswith(_WRAPPERS):
            short = short.partition(".")[2]
        if is_ignored(short):
            continue
        owner, _, leaf = short.removesuffix(".weight").rpartition(".")
        if leaf in ours:
            short = f"{owner}.{ours[leaf]}"
        if short in plain:
            raise StoredError(f"tensors {plain[short]} and {name} are the same parameter")
        plain[short] = name
    return plain


def _check_wrapped(
    linears: Mapping[str, ParameterizedLinear], names: set[str], options: dict[str, Any]
) -> None:
    """Refuse a model some of whose linears were left dense: ours parameterizes all seven kinds."""
    dense = [name for name in linears if f"{name}.weight" in names]
    if dense:
        raise StoredError(
            f"{dense[0]} is a dense linear there (target_modules {options.get('target_modules')}); only models whose "
            "linears of attention and MLP are all sparse plus low rank can be read"
        )


def _wanted(
    blank: Llama, linears: Mapping[str, ParameterizedLinear], method: MethodConfig
) -> dict[str, tuple[int, ...]]:
    """The logical shape of every parameter, as the reference stores it."""
    wanted = {}
    for name, parameter in blank.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner not in linears:
            wanted[name] = logical_shape(name, tuple(parameter.shape), blank.config)
            continue
        out, in_ = linears[owner].shape.logical_out, linears[owner].shape.logical_in
        count = int(method.density * (out * in_))
        wanted[name] = {
            "a": (method.rank, in_), "b": (out, method.rank), "values": (count,),
            "offsets": (count,), "scaling": (1,), "bias": (out,),
        }[leaf]  # fmt: skip
    return wanted


class _Reader:
    """Gives physical tensors: zeros around what is stored, indices counted in the padded matrix."""

    def __init__(
        self,
        files: TensorFiles,
        stored: dict[str, str],
        logical: dict[str, tuple[int, ...]],
        blank: Llama,
        linears: Mapping[str, ParameterizedLinear],
    ) -> None:
        self._files, self._stored, self._linears = files, stored, linears
        self.shapes = {
            name: logical[name]
            if name.endswith((".values", ".offsets"))
            else tuple(parameter.shape)
            for name, parameter in blank.named_parameters()
        }

    def read(self, name: str) -> Tensor:
        tensor = self._files.read(self._stored[name])
        if name.endswith(".offsets"):
            return self._offsets(name, tensor)
        if not tensor.is_floating_point():
            raise StoredError(f"tensor {self._stored[name]} is {tensor.dtype}, not floating point")
        if tuple(tensor.shape) == self.shapes[name]:
            return tensor
        padded = tensor.new_zeros(self.shapes[name])
        padded[tuple(slice(0, size) for size in tensor.shape)] = tensor
        return padded

    def _offsets(self, name: str, index: Tensor) -> Tensor:
        """Flat positions in [logical out, logical in] as int32 positions in the physical matrix."""
        shape = self._linears[name.removesuffix(".offsets")].shape
        theirs = self._stored[name]
        if index.dtype != torch.int64:
            raise StoredError(f"tensor {theirs} is {index.dtype}, not int64")
        if not bool((index[1:] > index[:-1]).all()):
            raise StoredError(f"tensor {theirs} is not sorted, or a position stands in it twice")
        if int(index[0]) < 0 or int(index[-1]) >= shape.logical_out * shape.logical_in:
            raise StoredError(
                f"tensor {theirs} points outside its {shape.logical_out} x {shape.logical_in} matrix"
            )
        row = index // shape.logical_in
        return (index + row * (shape.in_ - shape.logical_in)).to(torch.int32)
