"""Who decides the path of each kind of linear (params.paths), in this order, and where it is remembered:

    --linear_path     given: holds for all, nothing is asked or timed
    the checkpoint    that is continued: what the same key had there, so that a resume is bit-exact
    the cache         linear_paths.json in --cache_dir: what an earlier run timed for the same key
    the cost model    where it is clear
    timing            the rest, on the first rank, before the engine exists

A key of the checkpoint names machine, kernels, format, tokens and shape; a key of the cache the
versions of torch and of this package as well.
"""

import contextlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sltrain_dist import __version__
from sltrain_dist.config import TrainConfig
from sltrain_dist.ops import linear
from sltrain_dist.params import paths
from sltrain_dist.train.checkpoint import saved_linear_paths

CACHE = "linear_paths.json"
_FORMAT = "sltrain_dist linear paths 1"
Source = Literal["pinned", "checkpoint", "cached", "predicted", "timed"]


@dataclass(frozen=True)
class LinearPaths:
    """The decision: a path, and who chose it, by text of `paths.LinearKey`; the situation they are for."""

    situation: str
    chosen: Mapping[str, linear.Path]
    sources: Mapping[str, Source]
    keep_hidden: bool | None = None
    keeps_hidden: bool = False  # what comes of it on the device: r numbers a token each

    def apply(self, model: nn.Module) -> None:
        """Write it into the model's modules."""
        if self.chosen:
            paths.assign(model, self.situation, self.chosen, self.keep_hidden)

    def describe(self, model: nn.Module) -> str:
        """For the summary: "28 factorized, 14 composed, x A^T kept (of the shapes 3 timed, 0 cached)"; "" without linears."""
        counts = Counter(module.path for module in paths.linears(model))
        text = ", ".join(f"{count} {path}" for path, count in sorted(counts.items())[::-1])
        if counts["factorized"]:
            text += ", x A^T kept" if self.keeps_hidden else ", x A^T computed again"
        found = Counter(self.sources.values())
        if not text or "pinned" in found:
            return text and f"{text} (pinned)"
        notes = f"of the shapes {found['timed']} timed, {found['cached']} cached"
        notes += f", {found['predicted']} clear without" if found["predicted"] else ""
        notes += f", {found['checkpoint']} as in the checkpoint" if found["checkpoint"] else ""
        return f"{text} ({notes})"


def decide(
    config: TrainConfig,
    model: nn.Module,
    device: torch.device,
    checkpoint: Path | None,
    timing: bool = True,
) -> LinearPaths:
    """Choose for every linear of ``model``; on one rank, the others are told.

    Args:
        model: of the run's shapes; on the meta device.
        checkpoint: the step_N folder the run continues from.
        timing: False leaves what is close to the cost model too; the device need not be there.
    """
    tokens = config.engine.batch_size * config.data.sequence_length
    keep_hidden = {"auto": None, "yes": True, "no": False}[config.keep_hidden]
    situation = paths.Situation(device, getattr(torch, config.engine.dtype), tokens, keep_hidden)
    keys = {key.text: key for key in map(paths.key_of, paths.linears(model))}
    if config.linear_path != "auto":
        pinned: dict[str, Source] = dict.fromkeys(keys, "pinned")
        all_one = dict.fromkeys(keys, config.linear_path)
        return LinearPaths(situation.text, all_one, pinned, keep_hidden, situation.keeps)
    if not keys:
        return LinearPaths("", {}, {})
    saved = saved_linear_paths(checkpoint) if checkpoint is not None else {}
    cache = PathCache(Path(config.data.cache_dir).expanduser() / CACHE, situation.text)
    chosen: dict[str, linear.Path] = {}
    sources: dict[str, Source] = {}
    for text, key in keys.items():
        if (path := saved.get(f"{situation.text}, {text}")) is not None:
            chosen[text], sources[text] = path, "checkpoint"
        elif (path := cache.get(text)) is not None:
            chosen[text], sources[text] = path, "cached"
        elif not timing or not paths.is_close(key, situation):
            chosen[text], sources[text] = paths.settled(key, situation), "predicted"
    open_ = {text: key for text, key in keys.items() if text not in chosen}
    for text, key in open_.items():
        try:
            seconds = paths.measure(key, situation, paths.budget(len(open_)))
        except torch.OutOfMemoryError:
            chosen[text], sources[text] = paths.settled(key, situation), "predicted"
            continue
        chosen[text], sources[text] = paths.faster(seconds), "timed"
        cache.add(text, seconds)
    return LinearPaths(situation.text, chosen, sources, keep_hidden, situation.keeps)


class PathCache:
    """Timings of earlier runs in one JSON file, of which only this situation's are seen.

    A file that is damaged, foreign or of another format counts as empty and is replaced by the next
    timing; a folder that cannot be written costs no more than timing again.
    """

    def __init__(self, file: Path, situation: str) -> None:
        self.file = file
        self._prefix = f"torch {torch.__version__}, sltrain_dist {__version__}, {situation}, "

    def get(self, key: str) -> linear.Path | None:
        """The faster path of a key, None where it was never timed."""
        seconds = self._read().get(self._prefix + key)
        return None if seconds is None else paths.faster(seconds)

    def add(self, key: str, seconds: Mapping[linear.Path, float]) -> None:
        """Keep a timing beside what the file holds by now."""
        content = {"format": _FORMAT, "seconds": self._read() | {self._prefix + key: seconds}}
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=CACHE, dir=self.file.parent)
            try:
                with open(descriptor, "w", encoding="utf-8") as file:
                    json.dump(content, file, indent=1)
                os.chmod(name, 0o644)  # mkstemp's 0600 would shut out others of a shared cache
                os.replace(name, self.file)
            except OSError:
                os.unlink(name)

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            return {}
        timings = content.get("seconds")
        if not isinstance(timings, dict):
            return {}
        return {key: value for key, value in timings.items() if _is_timing(value)}


def _is_timing(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(path), float) and 0 < value[path] < float("inf")
        for path in linear.PATHS
    )
