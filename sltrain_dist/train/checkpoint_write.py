"""Writing a checkpoint, in three steps: ``stage``, ``write`` and ``commit``.

    stage   what is saved, as it is now                                  the training thread
    write   bytes to ``step_N.tmp``, forced to the disk                  any thread
    commit  the folder gets its name, ``latest`` follows, old ones go    the same, first rank only

``store`` is the last two. It talks to the other ranks over the group it is given, so that a thread
beside training can run it (checkpoint_async). When the disk fails on any rank no rank commits, the
checkpoints that stand are untouched and training may go on.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from sltrain_dist.config import TrainConfig
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.parallel.mesh import Mesh, gather_objects
from sltrain_dist.params import paths
from sltrain_dist.train.checkpoint_folder import (
    LATEST,
    STATE,
    TEMPORARY,
    Manifest,
    clean,
    entries,
    prune,
    publish,
    record,
    write_json,
    write_manifest,
)
from sltrain_dist.train.checkpoint_quantised import pieces_file, pieces_of
from sltrain_dist.train.checkpoint_tensors import (
    SaveError,
    describe,
    own_tensor_files,
    random_state,
    reason,
    write_tensors,
)

FORMAT = "sltrain_dist checkpoint 1"
_VERSIONED = ("torch", "numpy", "safetensors", "deepspeed", "transformers", "tokenizers")
T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """Where training stands, besides tensors; all JSON-able.

    ``step`` counts finished updates, ``tokens_seen`` the tokens they trained on; ``data`` is the
    data position and ``metrics`` what the metrics file needs to continue (its length in bytes).
    """

    step: int
    tokens_seen: int
    data: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """Outcome of a save: the new folder, or None where nothing was saved; warnings to print."""

    folder: Path | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Staged:
    """All that a checkpoint will hold, of one moment.

    The tensors may be the engine's own: then they must be written, or copied, before the next update.
    """

    tensors: dict[str, DTensor]
    document: dict[str, Any]
    random: dict[str, Any]
    pieces: dict[str, Any] | None = None  # of 8-bit moments

    @property
    def step(self) -> int:
        """Updates done at that moment."""
        return int(self.document["step"])


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def hexadecimal(number: int) -> str:
    """A support hash as it stands in ``state.json``: 16 digits, unsigned."""
    return f"{number & (2**64 - 1):016x}"


def stage(engine: Engine, progress: Progress, config: TrainConfig) -> Staged:
    """Collect what to save; collective. No tensor is copied that the engine does not have to copy."""
    tensors = engine.state()
    document = {
        "format": FORMAT,
        **dataclasses.asdict(progress),
        "engine": engine.name,
        "world_size": engine.mesh.world_size,
        "tensor_parallel": engine.mesh.tp_size,
        "scalars": engine.scalars(),
        "support_hash": hexadecimal(engine.support_hash()),
        "linear_paths": paths.assigned(engine.module),
        "model": dataclasses.asdict(config.model),
        "method": dataclasses.asdict(config.method),
        "config": config.to_json(),
        "versions": _versions(),
        "tensors": describe(tensors),
    }
    # Through JSON here, where all ranks do it: what cannot be saved must not fail on rank 0 alone.
    document = json.loads(json.dumps(document))
    return Staged(tensors, document, random_state(), pieces_of(engine))


def _together(mesh: Mesh, action: Callable[[], T], group: ProcessGroup | None) -> list[T]:
    """Run ``action`` on every rank and return all results; collective.

    Raises:
        SaveError: on all ranks, when the operating system failed on any.
    """
    outcome: tuple[T | None, str | None]
    try:
        outcome = (action(), None)
    except (OSError, MemoryError) as error:
        outcome = (None, reason(error))
    everyone = gather_objects(mesh, outcome, group)
    failures = [f"{text} (rank {rank})" for rank, (_, text) in enumerate(everyone) if text]
    if failures:
        raise SaveError(failures[0])
    return [value for value, _ in everyone]


def _on_first(mesh: Mesh, action: Callable[[], T], group: ProcessGroup | None) -> T:
    """``_together`` for work that rank 0 does for all; every rank gets its result."""
    results = _together(mesh, lambda: action() if mesh.is_first else None, group)
    shared: Any = results[0]
    return shared  # type: ignore[no-any-return]


def write(
    staged: Staged, folder: Path, mesh: Mesh, group: ProcessGroup | None = None
) -> dict[str, tuple[int, str]]:
    """Write this rank's files into ``folder`` and force them to the disk; collective.

    Returns:
        The manifest entries of all ranks' files, on every rank.

    Raises:
        SaveError: on all ranks, when the disk failed on any.
    """
    write_tensors(folder, staged.tensors, group)

    def finish() -> dict[str, tuple[int, str]]:
        random_path = folder / f"rng-{mesh.rank:05d}.json"
        write_json(random_path, staged.random, indent=None)
        own = [*own_tensor_files(folder, mesh.rank), random_path]
        if staged.pieces is not None:
            own.append(pieces_file(folder, mesh.rank))
            write_json(own[-1], staged.pieces, indent=None)
        if mesh.is_first:
            write_json(folder / STATE, staged.document)
            own.append(folder / STATE)
        return {path.name: record(path) for path in own}

    files: dict[str, tuple[int, str]] = {}
    for part in _together(mesh, finish, group):
        files.update(part)
    return files


def commit(
    temporary: Path, final: Path, files: dict[str, tuple[int, str]], step: int, keep_last: int
) -> list[str]:
    """Make a written folder a checkpoint; rank 0 only, after all ranks have written.

    Returns:
        Warnings about old checkpoints that could not be deleted.

    Raises:
        OSError: the checkpoint was not published.
    """
    strange = {path.name for path in temporary.iterdir()} - files.keys()
    if strange:  # torch changed its file names, or another run writes here
        raise OSError(f"unexpected files in {temporary}: {', '.join(sorted(strange))}")
    listed = entries(final.parent)
    hidden = sum(
        not entry.sealed for entry in listed
    )  # their serials, unknown now, are passed over
    serial = 1 + hidden + max((entry.serial for entry in listed), default=0)
    write_manifest(temporary, Manifest(step, serial, files))
    publish(temporary, final)
    try:
        prune(final.parent, keep_last)
    except OSError as error:
        return [f"an old checkpoint in {final.parent} could not be deleted: {reason(error)}"]
    return []


def _prepare(save_dir: Path, temporary: Path) -> None:
    save_dir.mkdir(parents=True, exist_ok=True)
    clean(save_dir)
    temporary.mkdir()


def _abandon(save_dir: Path, temporary: Path) -> str:
    """Remove a save that failed; returns the name of the newest checkpoint that stands."""
    shutil.rmtree(temporary, ignore_errors=True)
    with contextlib.suppress(OSError):
        (save_dir / (LATEST + TEMPORARY)).unlink(missing_ok=True)
    try:
        standing = entries(save_dir)
    except OSError:
        return "unknown"
    return standing[-1].folder.name if standing else "none"


def store(
    staged: Staged, save_dir: Path, keep_last: int, mesh: Mesh, group: ProcessGroup | None = None
) -> Saved:
    """Write and commit ``staged`` as ``save_dir/step_N``; collective over ``group`` (None: of all ranks).

    A failure of the disk on any rank (full, quota, I/O error) is no exception: nothing is published,
    the partial folder is removed and ``Saved.folder`` is None with one line that says why.
    """
    final = save_dir / f"step_{staged.step}"
    temporary = final.with_name(final.name + TEMPORARY)
    try:
        _on_first(mesh, lambda: _prepare(save_dir, temporary), group)
        files = write(staged, temporary, mesh, group)
        warnings = _on_first(
            mesh, lambda: commit(temporary, final, files, staged.step, keep_last), group
        )
    except SaveError as error:
        standing = _abandon(save_dir, temporary) if mesh.is_first else ""
        standing = gather_objects(mesh, standing, group)[0]
        return Saved(
            None,
            (
                f"checkpoint {final} was not saved: {error}; training goes on,"
                f" the newest checkpoint is still {standing}",
            ),
        )
    return Saved(final, tuple(warnings))
