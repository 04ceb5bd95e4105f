"""The anatomy of checkpoint folders on disk, free of tensors and processes.

    run folder/
      latest                the text "step_N": the newest whole checkpoint
      step_N/               one whole checkpoint
        shard-*.safetensors   tensors, one or a few files per rank
        rng-*.json            random states, one file per rank
        state.json            everything that is not a tensor
        manifest.json         size and SHA-256 of every file above; written last
      step_N.tmp/           being written, or left by a killed run; never read
      step_N.replaced/      the older step_N, for the moment in which a second one takes its name

A folder is whole when its manifest is readable and every file agrees with it. Folders change their
name only by rename(2), which a crash cannot cut in half, and only after all bytes are on the disk:
whatever the moment of a kill, a reader finds the old checkpoint or the new one.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATE = "state.json"
MANIFEST = "manifest.json"
LATEST = "latest"
TEMPORARY = ".tmp"
REPLACED = ".replaced"
_NAME = re.compile(r"step_(\d+)(\.replaced)?")
_UNREADABLE = ": unreadable ("
_CHUNK = 1 << 23  # bytes read at a time for a checksum


def _unreadable(name: str, error: OSError) -> str:
    """The problem line for a file the system could not read just now; its bytes may be whole."""
    return f"{name}{_UNREADABLE}{error.strerror or type(error).__name__})"


def is_unreadable(problem: str) -> bool:
    """Whether a problem line tells of a failed read (disk, network), not of wrong bytes."""
    return _UNREADABLE in problem


class DamagedError(Exception):
    """A checkpoint folder that cannot be trusted; the message names the file and the reason."""


@dataclass(frozen=True)
class Manifest:
    """What a folder must hold: ``files`` maps a file name to (size in bytes, SHA-256 in hex).

    ``serial`` counts the saves of a run folder. It, not the step, says which checkpoint is newer:
    after going back to an earlier step, lower steps are saved after higher ones.
    """

    step: int
    serial: int
    files: dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Entry:
    """A folder that carries the name of a checkpoint, whole or not.

    ``sealed``: its manifest could be read, so that ``serial`` is its own and it may be pruned.
    """

    folder: Path
    step: int
    serial: int
    sealed: bool = True


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder of this name stands for a checkpoint: step_N or step_N.replaced."""
    return _NAME.fullmatch(name) is not None


def no_folder(path: Path) -> str:
    """Why a path is not the folder that it should be, for the middle of an error line."""
    return "is a file" if path.exists() else "no such folder"


def sync(path: Path) -> None:
    """Force a file's bytes, or a directory's names, to the disk.

    Raises:
        OSError: the disk refused; the bytes must be taken for lost.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a small file and force it to the disk (not atomic: for folders nobody reads yet)."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def write_json(path: Path, document: Any, indent: int | None = 1) -> None:
    """``write_text`` of a JSON document."""
    write_text(path, json.dumps(document, indent=indent, sort_keys=True))


def digest(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    summary = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            summary.update(chunk)
    return summary.hexdigest()


def record(path: Path) -> tuple[int, str]:
    """Force a finished file to the disk and return its manifest entry (size, SHA-256)."""
    sync(path)
    return path.stat().st_size, digest(path)


def _seal(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``, sealed by a checksum of its own; raises OSError."""
    document: dict[str, Any] = {
        "step": manifest.step,
        "serial": manifest.serial,
        "files": {
            name: {"bytes": size, "sha256": summary}
            for name, (size, summary) in sorted(manifest.files.items())
        },
    }
    write_json(folder / MANIFEST, {**document, "seal": _seal(document)})


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json``.

    Raises:
        DamagedError: missing, not readable, or not what was written.
    """
    try:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedError(f"{MANIFEST}: missing") from None
    except OSError as error:
        raise DamagedError(_unreadable(MANIFEST, error)) from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST}: not readable ({type(error).__name__})") from None
    if not isinstance(document, dict) or document.pop("seal", None) != _seal(document):
        raise DamagedError(f"{MANIFEST}: checksum differs")
    try:
        files = {name: (f["bytes"], f["sha256"]) for name, f in document["files"].items()}
        for name in files:
            if not _is_file_name(name):
                raise DamagedError(f"{MANIFEST}: {name!r} is no name of a file beside it")
        return Manifest(int(document["step"]), int(document["serial"]), files)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DamagedError(f"{MANIFEST}: not of this format") from None


def _is_file_name(name: str) -> bool:
    """Whether ``name`` stays in its folder and can be a name at all (no zero byte, no lone surrogate)."""
    return name not in ("", "..") and Path(name).name == name and name.isprintable()


def file_problem(folder: Path, name: str, expected: tuple[int, str]) -> str | None:
    """What is wrong with one file of a manifest, or None."""
    path, (size, summary) = folder / name, expected
    try:
        found = path.stat().st_size
        if found != size:
            verdict = "truncated" if found < size else "too long"
            return f"{name}: {verdict}, {found} bytes where {size} were written"
        return None if digest(path) == summary else f"{name}: checksum differs"
    except FileNotFoundError:
        return f"{name}: missing"
    except OSError as error:
        return _unreadable(name, error)


def strangers(folder: Path, manifest: Manifest) -> list[str]:
    """Tensor files the manifest does not know; the reader would take them for shards."""
    found = {path.name for path in folder.glob("*.safetensors")}
    return [f"{name}: not in {MANIFEST}" for name in sorted(found - manifest.files.keys())]


def _may_be_folder(path: Path) -> bool:
    """False only where that is sure: a folder that cannot be read now must not count as absent."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return False
    except OSError:
        return True


def entries(run_folder: Path) -> list[Entry]:
    """All folders named like checkpoints, oldest first; none where ``run_folder`` does not exist.

    One without a readable manifest takes its place by its step, so that a damaged newest
    checkpoint is still met first and can be named.

    Raises:
        OSError: the folder exists and cannot be read.
    """
    try:
        names = os.listdir(run_folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for name in names:
        match, path = _NAME.fullmatch(name), run_folder / name
        if match and _may_be_folder(path):
            found.append((int(match[1]), match[2] is None, path))
    listed, serial = [], 0
    for step, _, path in sorted(found):
        sealed = False
        with contextlib.suppress(DamagedError):  # which then keeps the serial of the step below
            serial, sealed = read_manifest(path).serial, True
        listed.append(Entry(path, step, serial, sealed))
    return sorted(listed, key=lambda entry: (entry.serial, entry.step))


def read_latest(run_folder: Path) -> str | None:
    """The name in ``latest``, or None where it is missing or names no folder."""
    try:
        name = (run_folder / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return name if _NAME.fullmatch(name) and (run_folder / name).is_dir() else None


def discard(folder: Path) -> None:
    """Delete a checkpoint so that a kill in the middle leaves a ``.tmp``, not a damaged checkpoint."""
    doomed = folder.with_name(folder.name + ".deleted" + TEMPORARY)
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def clean(run_folder: Path) -> None:
    """Remove what killed runs left behind; raises OSError."""
    for path in list(run_folder.iterdir()):
        if path.name.endswith(TEMPORARY) and path.name.startswith(("step_", LATEST)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        elif _NAME.fullmatch(path.name) and path.name.endswith(REPLACED):
            final = path.with_name(path.name.removesuffix(REPLACED))
            if final.exists():
                discard(path)
            else:  # killed between the two renames of publish
                os.rename(path, final)


def publish(temporary: Path, final: Path) -> None:
    """Give a complete folder its name and point ``latest`` at it.

    ``latest.tmp`` is written first, so that only renames remain, which need no room on the disk.

    Raises:
        OSError: nothing was published, or all but the update of ``latest``.
    """
    parent, replaced = final.parent, final.with_name(final.name + REPLACED)
    waiting = parent / (LATEST + TEMPORARY)
    write_text(waiting, final.name + "\n")
    sync(temporary)
    if final.exists():
        os.rename(final, replaced)
    try:
        os.rename(temporary, final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    sync(parent)
    os.replace(waiting, parent / LATEST)
    sync(parent)


def prune(run_folder: Path, keep_last: int) -> None:
    """Keep the ``keep_last`` newest checkpoints (0: all); superseded ones always go. Raises OSError.

    A folder without a readable manifest neither counts nor goes: nobody can say how new it is, and
    what a disk or network refuses to read today it may give back tomorrow.
    """
    listed = entries(run_folder)
    for entry in listed:
        if entry.folder.name.endswith(REPLACED):
            discard(entry.folder)
    kept = [e for e in listed if e.sealed and not e.folder.name.endswith(REPLACED)]
    for entry in kept[: max(0, len(kept) - keep_last)] if keep_last > 0 else ():
        if entry.serial < kept[-1].serial:
            discard(entry.folder)
