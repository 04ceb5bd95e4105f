"""What is in a checkpoint, and whether all of it is right: offline, in one process, no tensor held in memory.

A report (``describe``) reads state.json and the headers of the tensor files. ``faults`` reads every byte: sizes
and checksums of the files, every element of every tensor exactly once, the names and shapes that the model
has, and the support, made again from the seed and compared by its hash.
"""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sltrain_dist.config import MethodConfig, ModelConfig
from sltrain_dist.parallel.quantised import QUANTISED
from sltrain_dist.train.checkpoint import FORMAT
from sltrain_dist.train.checkpoint_folder import (
    MANIFEST,
    STATE,
    TEMPORARY,
    DamagedError,
    Manifest,
    entries,
    file_problem,
    is_checkpoint_name,
    no_folder,
    read_latest,
    read_manifest,
    strangers,
)
from sltrain_dist.train.checkpoint_quantised import PIECES
from sltrain_dist.train.checkpoint_shards import FileError, Stored, coverage_problem, read_headers
from sltrain_dist.train.parameter_names import blank_specs, generated_hash
from sltrain_dist.utils.errors import UserError

WEIGHTS = "weights"
_MODEL = "model."


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint folder whose state.json and headers could be read. ``flag`` names it in errors."""

    folder: Path
    manifest: Manifest
    document: dict[str, Any]  # state.json
    tensors: dict[str, Stored]


def checkpoints(folder: Path, flag: str = "FOLDER") -> list[Path]:
    """The checkpoints that a path means: itself, or all of a run folder, oldest first.

    Raises:
        UserError: no such folder, an unfinished save, or no checkpoint in it.
    """
    if not folder.is_dir():
        raise UserError(
            f"{flag} {folder}: {no_folder(folder)}; give a run folder or one of its step_N"
        )
    name = folder.resolve().name
    if name.endswith(TEMPORARY):
        raise UserError(f"{flag} {folder}: a save that never finished; give its parent folder")
    if is_checkpoint_name(name) or (folder / MANIFEST).exists() or (folder / STATE).exists():
        return [folder]
    try:
        found = [entry.folder for entry in entries(folder)]
    except OSError as error:
        raise UserError(f"{flag} {folder}: not readable ({error.strerror})") from None
    if not found:
        raise UserError(f"{flag} {folder}: holds no checkpoint (no step_N folder)")
    return found


def open_folder(folder: Path) -> Opened:
    """Read what is not data; raises DamagedError, naming the file."""
    manifest = read_manifest(folder)
    for problem in strangers(folder, manifest):
        raise DamagedError(problem)
    try:
        document = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except OSError as error:
        raise DamagedError(f"{STATE}: {(error.strerror or 'unreadable').lower()}") from None
    except (ValueError, RecursionError):
        raise DamagedError(f"{STATE}: no JSON") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else None
        raise DamagedError(f"{STATE}: format {found!r}, this version reads {FORMAT!r}")
    try:
        return Opened(folder, manifest, document, read_headers(folder))
    except FileError as error:
        raise DamagedError(str(error)) from None
    except OSError as error:
        raise DamagedError(f"{error.filename}: {error.strerror}") from None


def faults(folder: Path) -> list[str]:
    """Everything wrong with a checkpoint, each a line that names a file or a tensor; empty when it is whole."""
    try:
        manifest = read_manifest(folder)
    except DamagedError as error:
        return [str(error)]
    found = [*strangers(folder, manifest)]
    found += filter(None, (file_problem(folder, *item) for item in sorted(manifest.files.items())))
    if found:  # what the files say is then not worth a look
        return found
    try:
        opened = open_folder(folder)
    except DamagedError as error:
        return [str(error)]
    try:
        return [*_wrong_tensors(opened), *_wrong_model(opened), *_missing_files(opened)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"{STATE}: not of this format ({type(error).__name__} {error})"]
    except UserError as error:  # a model or method that cannot be built
        return [f"{STATE}: {error}"]


def _wrong_tensors(opened: Opened) -> Iterator[str]:
    """The tensors that state.json promises against those in the files."""
    promised = opened.document["tensors"]
    for name in opened.tensors.keys() - promised.keys():
        # Of a chunk, not of ``files``: a tensor without elements is in none of these.
        yield f"{opened.tensors[name].chunks[0].file.name}: {name} is not in {STATE}"
    for name, entry in promised.items():
        stored = opened.tensors.get(name)
        shape = tuple(entry["shape"])
        if stored is None:
            if math.prod(shape):
                yield f"{name}: in no file"
            continue
        dtype = str(stored.dtype).removeprefix("torch.")
        if dtype != entry["dtype"]:
            yield f"{name}: {dtype} in the files, {entry['dtype']} in {STATE}"
        boxes = [(chunk.offsets, chunk.sizes) for chunk in stored.chunks]
        if problem := coverage_problem(shape, boxes):
            yield f"{name}: elements are {problem} (files {', '.join(stored.files) or 'none'})"
        elif stored.shape != shape:  # of tensors without elements, which cover any such shape
            yield f"{name}: {list(stored.shape)} in the files, {list(shape)} in {STATE}"


def _wrong_model(opened: Opened) -> Iterator[str]:
    """Weights and support against the model that state.json describes."""
    document = opened.document
    model, method = ModelConfig(**document["model"]), MethodConfig(**document["method"])
    specs = blank_specs(model, method)
    expected = {
        _MODEL + name: list(spec.shape) for name, spec in specs.items() if spec.kind != "indices"
    }
    found = {
        name: entry["shape"]
        for name, entry in document["tensors"].items()
        if name.startswith(_MODEL)
    }
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            yield f"{name}: {found.get(name)} in {STATE}, {expected.get(name)} in the model it describes"
    again = f"{generated_hash(specs, method.seed):016x}"
    if again != document["support_hash"]:
        yield f"{STATE}: support hash {document['support_hash']}, made again from seed {method.seed} {again}"


def _missing_files(opened: Opened) -> Iterator[str]:
    eight_bit = any(name.startswith(QUANTISED) for name in opened.document["tensors"])
    kinds = ("rng-", PIECES) if eight_bit else ("rng-",)
    for rank, kind in itertools.product(range(opened.document["world_size"]), kinds):
        name = f"{kind}{rank:05d}.json"
        if name not in opened.manifest.files:
            yield f"{name}: not in {MANIFEST}, though {opened.document['world_size']} ranks saved"


def describe(opened: Opened) -> dict[str, Any]:
    """A checkpoint as JSON-able data: what state.json says of the run, totals by kind, and every tensor."""
    document = opened.document
    fields = ("step", "tokens_seen", "engine", "world_size", "support_hash", "versions", "data")
    tensors = [
        {
            "name": stored.name,
            "shape": list(stored.shape),
            "dtype": str(stored.dtype).removeprefix("torch."),
            "bytes": stored.nbytes,
            "files": stored.files,
        }
        for stored in opened.tensors.values()
    ]
    totals: dict[str, dict[str, int]] = {}
    for stored in opened.tensors.values():
        total = totals.setdefault(kind_of(stored.name), {"tensors": 0, "elements": 0, "bytes": 0})
        total["tensors"] += 1
        total["elements"] += math.prod(stored.shape)
        total["bytes"] += stored.nbytes
    return {
        "folder": str(opened.folder),
        **{name: document.get(name) for name in fields},
        "tensor_parallel": document.get("tensor_parallel", 1),
        "weights_only": bool(document.get("weights_only")),
        "model": document["model"]["name"],
        "method": document["method"]["method"],
        "files": len(opened.manifest.files),
        "bytes": sum(size for size, _ in opened.manifest.files.values()),
        "totals": totals,
        "tensors": tensors,
    }


def kind_of(name: str) -> str:
    """ "weights", or the optimizer state a tensor belongs to: "optimizer exp_avg"."""
    return WEIGHTS if name.startswith(_MODEL) else " ".join(name.split(".")[:2])


def describe_run(folder: Path) -> list[dict[str, Any]]:
    """The checkpoints of a run, oldest first: name, step, age in seconds, bytes, fault (None: none seen).

    Sizes are compared, not checksums: ``faults`` reads every byte.
    """
    latest = read_latest(folder)
    rows = []
    for path in checkpoints(folder):
        row: dict[str, Any] = {"name": path.name, "latest": path.name == latest, "fault": None}
        row |= {"step": None, "age": None, "bytes": None}
        try:
            manifest = read_manifest(path)
            row["step"], row["age"] = manifest.step, time.time() - (path / MANIFEST).stat().st_mtime
            row["bytes"] = sum(size for size, _ in manifest.files.values())
            for name, (size, _) in sorted(manifest.files.items()):
                actual = (path / name).stat().st_size
                if actual != size:
                    raise DamagedError(f"{name}: {actual} bytes where {size} were written")
            for problem in strangers(path, manifest):
                raise DamagedError(problem)
        except DamagedError as error:
            row["fault"] = str(error)
        except OSError as error:
            row["fault"] = f"{Path(str(error.filename)).name}: {(error.strerror or '').lower()}"
        rows.append(row)
    return rows
