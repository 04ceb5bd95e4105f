"""Which checkpoint a run continues from: the newest whole one that ``--continue_from`` can mean.

Every byte is checked before it is believed. The checksums are shared out over the ranks and the
verdict is agreed, so that no rank goes on with a checkpoint another one refuses. Where checkpoints
exist and none is whole, a run ends: a fresh start beside them would in time prune what a moment's
failure of the disk had only hidden.
"""

from dataclasses import dataclass
from pathlib import Path

from sltrain_dist.parallel.mesh import Mesh, gather_objects
from sltrain_dist.train.checkpoint_folder import (
    LATEST,
    MANIFEST,
    TEMPORARY,
    DamagedError,
    Entry,
    Manifest,
    entries,
    file_problem,
    is_checkpoint_name,
    is_unreadable,
    no_folder,
    read_latest,
    read_manifest,
    strangers,
)
from sltrain_dist.utils.errors import UserError

AUTO = "auto"
_FLAG = "--continue_from"


@dataclass(frozen=True)
class Found:
    """The folder to load (None: start fresh) and the lines to print about what was passed over."""

    folder: Path | None
    warnings: tuple[str, ...] = ()


def _candidates(continue_from: str, save_dir: Path) -> tuple[list[Entry], list[str]]:
    """The folders to try, best first, and warnings; raises UserError."""
    if continue_from == AUTO:
        return entries(save_dir)[::-1], []
    target = Path(continue_from)
    if not target.is_dir():
        raise UserError(
            f"{_FLAG} {continue_from}: {no_folder(target)}; give a run folder, one of its"
            f" step_N folders, or {AUTO}"
        )
    name = target.resolve().name
    if name.endswith(TEMPORARY):
        raise UserError(
            f"{_FLAG} {continue_from}: a save that never finished; give its parent folder"
        )
    warnings: list[str] = []
    start: str | None = name
    run_folder = target.resolve().parent
    if not is_checkpoint_name(name):
        if (target / MANIFEST).is_file():  # a checkpoint that was given another name
            return [Entry(target, 0, 0)], []
        run_folder, start = target, read_latest(target)
    listed = entries(run_folder)
    if not listed:
        raise UserError(f"{_FLAG} {continue_from}: holds no checkpoint (no step_N folder)")
    names = [entry.folder.name for entry in listed]
    if start is None:
        start = names[-1]
        warnings.append(
            f"{run_folder / LATEST} is missing or names no checkpoint; {start} is the newest"
        )
    return listed[: names.index(start) + 1][::-1], warnings


def _manifest(folder: Path, mesh: Mesh) -> Manifest | str:
    """The manifest as rank 0 sees it, or what is wrong with it; collective."""
    answer: Manifest | str = ""
    if mesh.rank == 0:
        try:
            answer = read_manifest(folder)
            answer = next(iter(strangers(folder, answer)), answer)
        except DamagedError as error:
            answer = str(error)
    shared: Manifest | str = gather_objects(mesh, answer)[0]
    return shared


def _share(manifest: Manifest, mesh: Mesh) -> list[str]:
    """The files this rank checks: largest first, each to the rank with the fewest bytes so far."""
    loads = [0] * mesh.world_size
    mine = []
    for name, (size, _) in sorted(manifest.files.items(), key=lambda item: (-item[1][0], item[0])):
        rank = loads.index(min(loads))
        loads[rank] += size
        if rank == mesh.rank:
            mine.append(name)
    return mine


def verify(folder: Path, mesh: Mesh) -> list[str]:
    """Everything that is wrong with a checkpoint folder, each naming a file; empty when it is whole.

    Collective: sizes and SHA-256 of all files are checked, shared out over the ranks, and every
    rank returns the same list.
    """
    manifest = _manifest(folder, mesh)
    if isinstance(manifest, str):
        return [manifest]
    mine = [file_problem(folder, name, manifest.files[name]) for name in _share(manifest, mesh)]
    everyone = gather_objects(mesh, [problem for problem in mine if problem is not None])
    return sorted(problem for problems in everyone for problem in problems)


def find(continue_from: str | None, save_dir: Path, mesh: Mesh) -> Found:
    """The checkpoint that ``--continue_from`` means; collective, the same on every rank.

    Args:
        continue_from: a run folder (its ``latest``), one ``step_N`` folder, ``auto`` (the newest
            whole checkpoint in ``save_dir``; a fresh start only where it has no ``step_N`` at all), or
            None (a fresh start).
        save_dir: where this run saves.

    A damaged checkpoint is named in a warning and the one saved before it is tried.

    Raises:
        UserError: the folder does not exist, holds no checkpoint, or none of them is whole.
    """
    if continue_from is None:
        return Found(None)
    answer: tuple[list[Entry], list[str]] | str = ""
    if mesh.rank == 0:
        try:
            answer = _candidates(continue_from, save_dir)
        except UserError as error:
            answer = str(error)
        except OSError as error:
            answer = f"{_FLAG} {continue_from}: not readable ({error.strerror})"
    shared: tuple[list[Entry], list[str]] | str = gather_objects(mesh, answer)[0]
    if isinstance(shared, str):
        raise UserError(shared)
    candidates, warnings = shared
    damaged: list[str] = []
    unreadable = False
    for entry in candidates:
        problems = verify(entry.folder, mesh)
        if not problems:
            use = f"using {entry.folder.name} instead"
            warnings += [f"checkpoint {line}; {use}" for line in damaged]
            return Found(entry.folder, tuple(warnings))
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        hidden = all(is_unreadable(problem) for problem in problems)
        verdict = "unreadable" if hidden else "damaged"
        unreadable |= hidden
        damaged.append(f"{entry.folder} is {verdict} ({problems[0]}{more})")
    if not damaged:  # auto, in a folder without checkpoints
        return Found(None, tuple(warnings))
    again = "run again when it can be read, " if unreadable else ""
    raise UserError(
        f"{_FLAG} {continue_from}: no whole checkpoint: {'; '.join(damaged)};"
        f" {again}move the folder away or give another --save_dir"
    )
