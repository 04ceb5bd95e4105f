"""Is this checkpoint one of this run's model, method, support, optimizer and data?

Asked before anything is loaded. The answer is the first difference, in the words of the flag or the
parameter a user would look for. Conversions between floating dtypes are let through, and said; so
are changes of what a user may change on the way, such as the learning rate.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sltrain_dist.config import TrainConfig
from sltrain_dist.optim.packages import PROJECTED
from sltrain_dist.utils.errors import UserError

_METHOD_FLAGS = {
    "rank": "--rank",
    "alpha": "--lora_alpha",
    "train_scaling": "--train_scaling",
    "density": "--sp_ratio",
    "support": "--support",
    "block_size": "--block_size",
    "pattern": "--slope_pattern",
}
_METHOD_FIELDS = {  # the fields of MethodConfig that change the model, by method
    "full": (),
    "low_rank": ("rank", "alpha", "train_scaling"),
    "sltrain": ("rank", "alpha", "train_scaling", "density", "support"),
    "slope": ("pattern",),
}
_DATA_FLAGS = {  # the fields of DataConfig that the order of samples depends on
    "sequence_length": "--max_length",
    "pack": "--pack",
    "seed": "--seed",
}
_CHANGES = (  # what may change on a resume, and is then said: (part of the config, field, flag)
    ("optimizer", "lr", "--lr"),
    ("optimizer", "scheduler", "--scheduler"),
    ("optimizer", "cycle_length", "--cycle_length"),
    ("optimizer", "min_lr_ratio", "--min_lr_ratio"),
    ("optimizer", "warmup_steps", "--warmup_steps"),
    ("optimizer", "total_steps", "--num_training_steps"),
    ("optimizer", "weight_decay", "--weight_decay"),
    ("optimizer", "momentum", "--beta1"),
    ("optimizer", "betas", "--betas"),
    ("optimizer", "eps", "--eps"),
    ("optimizer", "grad_clipping", "--grad_clipping"),
    ("optimizer", "per_layer_clip", "--per_layer_clip"),
    ("optimizer", "update_proj_gap", "--update_proj_gap"),
    ("optimizer", "proj_scale", "--proj_scale"),
    ("optimizer", "rounding", "rounding of bfloat16 weights"),
    ("method", "dropout", "--lora_dropout"),
    ("method", "mask_change_freq", "--mask_change_freq"),
    ("engine", "per_layer", "--per_layer"),
    ("engine", "master_weights", "float32 masters"),
    ("engine", "dtype", "--dtype"),
)
_MODEL_FREE = ("name", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
_CONVERTIBLE = {"float32", "bfloat16"}


def _refuse(folder: Path, difference: str, mend: str) -> UserError:
    return UserError(f"--continue_from {folder}: {difference}; {mend}")


def _check_method(document: dict[str, Any], config: TrainConfig, folder: Path) -> None:
    saved, here = document["method"], config.method
    if saved.get("method") != here.method:
        raise _refuse(
            folder,
            f"trained with --method {saved.get('method')}, this run has --method {here.method}",
            "give the same method, or another --save_dir for a new run",
        )
    fields = _METHOD_FIELDS.get(here.method, tuple(_METHOD_FLAGS))
    if "support" in fields and here.support == "block":
        fields = (*fields, "block_size")
    for name in fields:
        if saved.get(name) != getattr(here, name):
            flag, old = _METHOD_FLAGS[name], saved.get(name)
            raise _refuse(
                folder,
                f"trained with {flag} {old}, this run has {flag} {getattr(here, name)}",
                f"give {flag} {old}, or another --save_dir for a new run",
            )


def _check_tensors(
    saved: dict[str, dict[str, Any]], here: dict[str, dict[str, Any]], prefix: str, folder: Path
) -> list[tuple[str, str, str]]:
    """Names, shapes and dtypes of one family of tensors; returns conversions (name, from, to)."""
    what, mend = (
        ("model", "give the --model_config it was trained with")
        if prefix == "model."
        else ("optimizer", "give the --optimizer it was trained with")
    )
    conversions = []
    ours = [name for name in here if name.startswith(prefix)]
    theirs = [name for name in saved if name.startswith(prefix)]
    for name in [*ours, *(name for name in theirs if name not in here)]:
        if name not in saved or name not in here:
            has, lacks = ("the checkpoint", "this run") if name in saved else ("this run", "it")
            raise _refuse(folder, f"of another {what}: {has} has {name}, {lacks} has not", mend)
        old, new = saved[name], here[name]
        if old["shape"] != new["shape"]:
            shapes = f"{old['shape']} in the checkpoint, {new['shape']} in this run"
            raise _refuse(folder, f"of another {what}: {name} is {shapes}", mend)
        if old["dtype"] != new["dtype"]:
            if not {old["dtype"], new["dtype"]} <= _CONVERTIBLE:
                dtypes = f"{old['dtype']} in the checkpoint, {new['dtype']} in this run"
                raise _refuse(folder, f"of another {what}: {name} is {dtypes}", mend)
            conversions.append((name, old["dtype"], new["dtype"]))
    return conversions


def _check_architecture(document: dict[str, Any], config: TrainConfig, folder: Path) -> None:
    """Fields that no tensor shape shows, such as rope_theta or the number of heads."""
    saved = document["model"]
    here = json.loads(json.dumps(config.to_json()["model"]))
    for name in here:
        if name not in _MODEL_FREE and saved.get(name) != here[name]:
            raise _refuse(
                folder,
                f"of another model: {name} is {saved.get(name)}, in this run {here[name]}",
                "give the --model_config it was trained with",
            )


def _check_optimizer(document: dict[str, Any], config: TrainConfig, folder: Path) -> None:
    """The optimizer by name: adam and adamw keep the same tensors and are not the same."""
    saved, here = document["config"]["optimizer"]["name"], config.optimizer.name
    if saved != here:
        raise _refuse(
            folder,
            f"of another optimizer: trained with --optimizer {saved}, this run has --optimizer {here}",
            f"give --optimizer {saved}, or another --save_dir for a new run",
        )
    shaping = {"embedding_state_bits": "8bit" in here, "proj_rank": here in PROJECTED}
    for name, shapes_state in shaping.items():
        old = document["config"]["optimizer"].get(name, 32)
        new = getattr(config.optimizer, name)
        if shapes_state and old != new:
            raise _refuse(
                folder,
                f"trained with --{name} {old}, this run has {new}",
                f"give --{name} {old}, or another --save_dir for a new run",
            )


def _check_data(document: dict[str, Any], config: TrainConfig, folder: Path) -> None:
    """What the position in the data counts on. The text itself is compared where it is open (data.entry)."""
    saved, here = document["config"], json.loads(json.dumps(config.to_json()))
    pairs = [
        ("--total_batch_size", saved.get("total_batch_size"), here["total_batch_size"]),
        *(
            (flag, saved["data"].get(name), here["data"][name])
            for name, flag in _DATA_FLAGS.items()
        ),
    ]
    if here["data"]["tokenizer"] in (None, "trained") and not config.data.corpus.startswith("c4"):
        size = "vocab_size"  # of a tokenizer trained on the corpus; others do not depend on it
        pairs.append(("--tokenizer_vocab", saved["data"].get(size), here["data"][size]))
    for flag, old, new in pairs:
        if old != new:
            raise _refuse(
                folder,
                f"trained with {flag} {old}, this run has {flag} {new}",
                f"give {flag} {old}, or another --save_dir for a new run",
            )


def changes(
    document: dict[str, Any], config: TrainConfig, linear_paths: Mapping[str, str]
) -> list[str]:
    """What goes on otherwise than in the checkpoint, though it may: at most two lines to print.

    Args:
        document: the checkpoint's ``state.json``.
        linear_paths: this run's, as ``params.paths.assigned`` gives them.
    """
    saved, here = document["config"], json.loads(json.dumps(config.to_json()))
    found = [
        f"{flag} {saved[part][name]} -> {here[part][name]}"
        for part, name, flag in _CHANGES
        if name in saved.get(part, {}) and saved[part][name] != here[part][name]
    ]
    lines = [f"changed since the checkpoint: {', '.join(found)}"] if found else []
    if linear_paths:
        lines += _changed_paths(document.get("linear_paths"), linear_paths)
    return lines


def _changed_paths(before: Mapping[str, str] | None, now: Mapping[str, str]) -> list[str]:
    """At most one line: linears that are computed otherwise than before, or were chosen for another situation."""
    note = "the same mathematics, not bit-exact"
    if before is None:  # a checkpoint older than the choice: all were composed
        count = sum(path != "composed" for path in now.values())
        return (
            [f"{count} of {len(now)} shapes of linears were composed in the checkpoint; {note}"]
            if count
            else []
        )
    other = [key for key, path in now.items() if before.get(key, path) != path]
    if other:
        old, new = before[other[0]], now[other[0]]
        return [
            f"--linear_path {new}: {len(other)} of {len(now)} shapes of linears were {old} in the checkpoint; {note}"
        ]
    if moved := [key for key in now if key not in before]:
        old = next(iter(before), "none")
        return [
            f"paths of linears chosen anew: now for {moved[0]!r}, in the checkpoint for {old!r}; {note}"
        ]
    return []


def check_configuration(document: dict[str, Any], config: TrainConfig, folder: Path) -> None:
    """Compare the "model" and "method" of a run's ``config.json`` with this run's.

    Raises:
        UserError: the first difference that no checkpoint would be loaded across.
    """
    _check_method(document, config, folder)
    _check_architecture(document, config, folder)


def check_identity(
    document: dict[str, Any],
    tensors: dict[str, dict[str, Any]],
    support_hash: str,
    config: TrainConfig,
    folder: Path,
) -> list[str]:
    """Compare a checkpoint's ``state.json`` with this run.

    Args:
        document: the checkpoint's ``state.json``.
        tensors: {name: {"shape", "dtype"}} of this run's engine, names "model.*" and "optimizer.*".
        support_hash: this run's, 16 hex digits.

    Returns:
        At most one line, saying how many tensors change between float32 and bfloat16.

    Raises:
        UserError: the first difference in method, model, support, optimizer or order of the data.
    """
    _check_method(document, config, folder)
    conversions = _check_tensors(document["tensors"], tensors, "model.", folder)
    _check_architecture(document, config, folder)
    if document["support_hash"] != support_hash:
        raise _refuse(
            folder,
            f"of another support: hash {document['support_hash']}, in this run {support_hash}",
            f"give --seed {document['method']['seed']}, which it was trained with",
        )
    if not document.get("weights_only"):  # else any optimizer may start anew
        _check_optimizer(document, config, folder)
    conversions += _check_tensors(document["tensors"], tensors, "optimizer.", folder)
    _check_data(document, config, folder)
    if not conversions:
        return []
    name, old, new = conversions[0]
    return [f"{len(conversions)} tensors are converted from {old} to {new} (first: {name})"]
