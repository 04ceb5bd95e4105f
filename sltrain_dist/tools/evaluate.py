"""Perplexity of any trained model on any corpus: the question a training run answers at its end, asked again.

What is not asked for comes from the run itself (its corpus, sample length, packing, number of tokens,
batch and number format), so that a run's folder alone gives its final loss again. Ranks share the
batches; each holds the whole model.

    settings <- request, else the run -> tokenizer (the model's own) -> index in the cache -> batches -> loss
"""

import itertools
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from sltrain_dist.config import DataConfig
from sltrain_dist.data.cache import Cache
from sltrain_dist.data.documents import StreamCorpus
from sltrain_dist.data.evaluation import Evaluation
from sltrain_dist.data.index import open_split
from sltrain_dist.data.samples import make_samples
from sltrain_dist.data.tokenizer import Tokenizer
from sltrain_dist.parallel.mesh import Mesh, gather_patiently
from sltrain_dist.tools.inference import (
    check_length,
    check_merged,
    choose_dtype,
    choose_paths,
    choose_tokenizer,
)
from sltrain_dist.tools.weights import Pretrained, load_model, open_pretrained
from sltrain_dist.train.build import on_first
from sltrain_dist.train.checkpoint_folder import STATE
from sltrain_dist.train.evaluate import evaluate, perplexity
from sltrain_dist.utils.errors import UserError

T = TypeVar("T")
SPLITS = {"held_out": ("held_out",), "all": ("train", "held_out")}
_BATCH = 16  # samples, where no run says how many


@dataclass(frozen=True)
class Request:
    """What is asked for; None: as the run had it, or, for a model that is no run, as `_settings` says.

    model: a folder that `open_pretrained` knows. split: a key of ``SPLITS``. merged: dense W; None and
    False: as stored.
    """

    model: str
    corpus: str | None = None
    tokenizer: str | None = None
    max_length: int | None = None
    pack: str | None = None
    eval_tokens: int | None = None
    batch_size: int | None = None
    eval_mode: str | None = None
    split: str = "held_out"
    merged: bool | None = None
    dtype: str | None = None
    cache_dir: str | None = None


@dataclass(frozen=True)
class Settings:
    """The request with nothing left open.

    ranks: over which reference mode deals the batches, for its means depend on it: the run's.
    """

    data: DataConfig
    batch_size: int
    mode: str
    dtype: torch.dtype
    ranks: int


@dataclass(frozen=True)
class _Whole:
    """A whole model on every rank, in the place of an engine."""

    module: nn.Module
    mesh: Mesh


def run(request: Request, mesh: Mesh) -> dict[str, Any]:
    """Evaluate; the same JSON-able result on every rank.

    Raises:
        UserError: model, corpus, tokenizer or a setting that cannot be used.
    """
    on_first(mesh, lambda: _verify(request.model), patient=True)
    pretrained = open_pretrained(request.model, "MODEL", verify=False)
    settings = _settings(request, pretrained, mesh.device)
    merged = check_merged(request.merged, pretrained)
    tokenizer = choose_tokenizer(request.tokenizer, pretrained)
    held = _open(settings, tokenizer, pretrained, SPLITS[request.split], mesh)
    length = settings.data.sequence_length
    try:
        model = load_model(pretrained, mesh.device, settings.dtype, merged)
        samples = max(part.samples for part in held)
        choose_paths(model, min(settings.batch_size, samples) * length)
        batches = itertools.chain.from_iterable(held)
        loss, tokens = evaluate(_Whole(model, mesh), batches, settings.mode)
    except torch.OutOfMemoryError:
        raise UserError(
            f"--batch_size {settings.batch_size}: out of memory on {mesh.device}; take a smaller one"
        ) from None
    if settings.mode == "reference":
        loss *= _as_on(mesh.dp_size, held, settings) / _as_on(settings.ranks, held, settings)
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "tokens": tokens,
        "samples": sum(part.samples for part in held),
        "eval_mode": settings.mode,
        "corpus": settings.data.corpus,
        "split": request.split,
        "pack": settings.data.pack,
        "max_length": length,
        "batch_size": settings.batch_size,
        "model": str(pretrained.path),
        "kind": pretrained.kind,
        "method": pretrained.method.method,
        "merged": merged,
        "dtype": str(settings.dtype).removeprefix("torch."),
    }


def describe(result: dict[str, Any]) -> str:
    """The result for people, in a few lines."""
    made_of = result["method"] + (", merged" if result["merged"] else "")
    rows = {
        "model": f"{result['model']} ({result['kind']}, {made_of}, {result['dtype']})",
        "text": f"{result['corpus']}, {result['split'].replace('_', '-')}, {result['pack']}, "
        f"samples of {result['max_length']} tokens",
        "tokens": f"{result['tokens']:,} in {result['samples']:,} samples",
        "loss": f"{result['loss']:.6f} nats a token ({result['eval_mode']})",
        "perplexity": f"{result['perplexity']:.4f}",
    }
    return "\n".join(f"{name:<11} {text}" for name, text in rows.items())


def _same(mesh: Mesh, action: Callable[[], T]) -> T:
    """``action`` on every rank; where one has a UserError, all raise the first, so that none waits for it."""
    result: T | None = None
    problem = None
    try:
        result = action()
    except UserError as error:
        problem = str(error)
    problems = [found for found in gather_patiently(mesh, problem) if found]
    if problems:
        raise UserError(problems[0])
    return cast(T, result)


def _verify(model: str) -> None:
    open_pretrained(model, "MODEL")


def _as_on(ranks: int, held: list[Evaluation], settings: Settings) -> int:
    """What reference mode divides the sum of batch means by, on so many ranks: R (n + 1), n batches each."""
    dealt = settings.batch_size * ranks
    return ranks * (sum(-(-part.samples // dealt) for part in held) + 1)


def _settings(request: Request, pretrained: Pretrained, device: torch.device) -> Settings:
    """Fill what the request leaves open from the run, else from defaults.

    Raises:
        UserError: a value out of its range, or no --corpus where no run has one.
    """
    config = _run_config(pretrained)
    data = DataConfig(**config["data"]) if config else DataConfig(corpus="")
    if not config:
        data = replace(
            data,
            sequence_length=min(data.sequence_length, pretrained.model.max_position_embeddings),
        )
    given: dict[str, Any] = {
        "corpus": request.corpus,
        "pack": request.pack,
        "sequence_length": request.max_length,
        "eval_tokens": request.eval_tokens,
        "cache_dir": request.cache_dir,
    }
    data = replace(data, **{name: value for name, value in given.items() if value is not None})
    if not data.corpus:
        raise UserError(f"--corpus is required: MODEL {pretrained.path} is no run that has one")
    engine = config["engine"] if config else {}
    batch = engine.get("batch_size", _BATCH) if request.batch_size is None else request.batch_size
    for flag, value, least in (
        ("max_length", data.sequence_length, 2),
        ("eval_tokens", data.eval_tokens, 1),
        ("batch_size", batch, 1),
    ):
        if value < least:
            raise UserError(f"--{flag} {value}: must be at least {least}")
    check_length(data.sequence_length, pretrained.model)
    mode = request.eval_mode or (config["eval_mode"] if config else "exact")
    dtype = choose_dtype(request.dtype or engine.get("dtype"), device)
    ranks = 1
    if config:
        ranks = config["total_batch_size"] // (
            engine["batch_size"] * engine["gradient_accumulation"]
        )
    return Settings(data, batch, mode, dtype, ranks)


def _run_config(pretrained: Pretrained) -> dict[str, Any] | None:
    """The configuration of the run that a checkpoint is of; None for exports and foreign models."""
    if pretrained.kind != "checkpoint":
        return None
    document = json.loads((pretrained.path / STATE).read_text(encoding="utf-8"))
    config: dict[str, Any] = document["config"]
    return config


def _open(
    settings: Settings,
    tokenizer: Tokenizer,
    pretrained: Pretrained,
    splits: tuple[str, ...],
    mesh: Mesh,
) -> list[Evaluation]:
    """This rank's share of the text, tokenised once per node into the cache that training uses.

    Raises:
        UserError: on every rank, for anything wrong with --corpus or --cache_dir on one of them.
    """
    data = settings.data
    cache = _same(mesh, lambda: Cache(data, pretrained.model.vocab_size, for_training=False))
    if isinstance(cache.corpus, StreamCorpus) and "train" in splits:
        raise UserError(
            f"--split all: --corpus {data.corpus} is a stream without end; take --split held_out"
        )
    _same(mesh, lambda: cache.prepare_index(tokenizer) if mesh.local_rank == 0 else None)
    folder = _same(mesh, lambda: cache.open_index(tokenizer))
    left, parts = data.eval_tokens, []
    for split in splits:
        samples = make_samples(open_split(folder, split), data.pack, data.sequence_length)
        targets = samples.targets()
        if left > 0 and int(targets.sum()):
            parts.append(
                Evaluation(
                    samples,
                    eval_tokens=left,
                    micro_batch=min(settings.batch_size, len(targets)),  # more would be filling
                    dp_rank=mesh.dp_rank,
                    dp_size=mesh.dp_size,
                )
            )
            left -= parts[-1].tokens
    if not parts:
        more = "" if "train" in splits else ", or --split all"
        raise UserError(
            f"--corpus {data.corpus}: its {' and '.join(splits).replace('_', '-')} part has nothing to predict; "
            f"give a longer text{more}"
        )
    return parts


def check_target(target: Path) -> None:
    """Refuse a place where `write` could not write, before anything is evaluated.

    Raises:
        UserError: a folder, or nothing that can be written in.
    """
    folder = target.absolute().parent
    if target.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        problem = "is a folder" if target.is_dir() else f"{folder} is no folder to write in"
        raise UserError(f"--json {target}: {problem}; give a new file")


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the result as strict JSON: a loss that is not finite becomes null.

    Raises:
        UserError: the file cannot be written.
    """
    document = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in result.items()
    }
    try:
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path}: not writable ({error.strerror})") from None
