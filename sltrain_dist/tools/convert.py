"""A checkpoint written again: in other files, in another float format, with or without optimizer state.

The result is a checkpoint like any other, which every layout resumes from. Streaming: one part of one tensor
is in memory at a time, so that what a cluster has written can be converted on a small machine.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sltrain_dist.parallel.quantised import QUANTISED
from sltrain_dist.tools.checkpoint_report import WEIGHTS, faults, kind_of, open_folder
from sltrain_dist.tools.output import new_folder
from sltrain_dist.train.checkpoint_folder import (
    STATE,
    Manifest,
    record,
    write_json,
    write_manifest,
)
from sltrain_dist.train.checkpoint_quantised import PIECES
from sltrain_dist.train.checkpoint_shards import Piece, Stored, read_rows, write_file
from sltrain_dist.utils.errors import UserError

FILE_BYTES = 4 << 30  # of a file, where the number of files is not given
MOST_SHARDS = 99_999  # five digits in a file's name
_FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Converted:
    """What was written. dropped: optimizer tensors left out. converted: tensors in another dtype."""

    folder: Path
    files: int
    tensors: int
    bytes: int
    dropped: int
    converted: int


def convert(
    source: Path,
    output: Path,
    *,
    weights_only: bool = False,
    dtype: str | None = None,
    shards: int | None = None,
) -> Converted:
    """Write the checkpoint ``source`` as ``output``.

    Args:
        weights_only: leave the optimizer's state out; a resume then starts its moments at zero.
        dtype: "float32" or "bfloat16" for every tensor that has one of the two; None: as they are.
        shards: tensor files; each holds one of so many cuts of every tensor along dim 0. None: of 4 GiB.

    Raises:
        UserError: a damaged source, an output that exists, a disk that is full; nothing is left then.
    """
    if shards is not None and not 1 <= shards <= MOST_SHARDS:
        raise UserError(f"--shards {shards}: must lie in [1, {MOST_SHARDS}]")
    if output.exists() or output.is_symlink():
        raise UserError(f"--output {output}: exists; give a new folder")
    if wrong := faults(source):
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"FOLDER {source}: damaged ({wrong[0]}{more}); nothing was converted")
    opened = open_folder(source)
    kept = {
        name: opened.tensors[name]
        for name in opened.document["tensors"]
        if name in opened.tensors and (not weights_only or kind_of(name) == WEIGHTS)
    }
    dtypes = {name: _converted(name, stored.dtype, dtype) for name, stored in kept.items()}
    total = sum(math.prod(stored.shape) * dtypes[name].itemsize for name, stored in kept.items())
    count = shards or max(1, -(-total // FILE_BYTES))
    document = _document(opened.document, dtypes, weights_only)
    with new_folder(output) as folder:
        names = _write_shards(folder, kept, dtypes, count)
        write_json(folder / STATE, document)
        for name in opened.manifest.files:
            if name.startswith("rng-") or (name.startswith(PIECES) and not weights_only):
                shutil.copyfile(source / name, folder / name)
        files = {path.name: record(path) for path in folder.iterdir()}
        write_manifest(folder, Manifest(opened.manifest.step, opened.manifest.serial, files))
    changed = sum(dtypes[name] != stored.dtype for name, stored in kept.items())
    dropped = len(opened.document["tensors"]) - len(kept)
    return Converted(output, len(names), len(kept), total, dropped, changed)


def _converted(name: str, dtype: torch.dtype, wanted: str | None) -> torch.dtype:
    """The dtype a tensor is written in; 8-bit moments, codes and scales, stay what they are."""
    if wanted is None or dtype not in _FLOATS or name.startswith(QUANTISED):
        return dtype
    found: torch.dtype = getattr(torch, wanted)
    return found


def _document(
    before: dict[str, Any], dtypes: dict[str, torch.dtype], weights_only: bool
) -> dict[str, Any]:
    """state.json of the result."""
    tensors = {
        name: {
            "shape": before["tensors"][name]["shape"],
            "dtype": str(dtype).removeprefix("torch."),
        }
        for name, dtype in dtypes.items()
    }
    after = {**before, "tensors": tensors}
    if weights_only:
        # The engine's counters count updates of an optimizer, and a new one starts at its first.
        after |= {"weights_only": True, "scalars": {"updates": 0, "optimizer_steps": 0}}
    return json.loads(json.dumps(after))  # type: ignore[no-any-return]


def _write_shards(
    folder: Path, kept: dict[str, Stored], dtypes: dict[str, torch.dtype], count: int
) -> list[str]:
    """Write the files, named as ``count`` ranks would name theirs; those that would be empty are left out."""
    names = []
    for number in range(count):
        pieces = [
            piece
            for name, stored in kept.items()
            if (piece := _piece(stored, dtypes[name], count, number)) is not None
        ]
        if pieces:
            name = f"shard-{number + 1:05d}-model-00001-of-00001.safetensors"
            write_file(folder / name, pieces)
            names.append(name)
    return names


def _piece(stored: Stored, dtype: torch.dtype, count: int, number: int) -> Piece | None:
    """Cut ``number`` of ``count`` along dim 0, even to a row; None where it has no element."""
    if not stored.shape:
        whole = Piece(stored.name, dtype, (), (), lambda: read_rows(stored).to(dtype))
        return whole if number == 0 else None
    start, stop = (stored.shape[0] * place // count for place in (number, number + 1))
    sizes = (stop - start, *stored.shape[1:])
    if not math.prod(sizes):
        return None
    offsets = (start, *(0 for _ in stored.shape[1:]))
    return Piece(
        stored.name, dtype, offsets, sizes, lambda: read_rows(stored, start, stop).to(dtype)
    )
