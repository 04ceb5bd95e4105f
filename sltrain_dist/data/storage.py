"""Folders of the cache that are either whole or absent: written aside, then renamed into place.

Several ranks, runs or machines may prepare the same thing at once. A lock file saves them double
work where the file system has locks; the rename alone keeps them from damaging each other.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sltrain_dist.utils.errors import UserError

_ABANDONED_SECONDS = 24 * 3600


def ensure_folder(
    folder: Path, is_valid: Callable[[Path], bool], write: Callable[[Path], None]
) -> bool:
    """Make sure that ``folder`` exists and ``is_valid``; ``write(temporary folder)`` makes a new one.

    Returns:
        True if it had to be written.

    Raises:
        UserError: the cache folder cannot be written, or the disk is full.
    """
    if is_valid(folder):
        return False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(folder.name + ".lock")):
            if is_valid(folder):
                return False
            _remove_abandoned(folder)
            temporary = Path(tempfile.mkdtemp(prefix=folder.name + ".tmp-", dir=folder.parent))
            try:
                temporary.chmod(0o755)  # mkdtemp's 0700 would shut out others of a shared cache
                write(temporary)
                _publish(temporary, folder, is_valid)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"--cache_dir {folder.parent}: cannot be written ({error.strerror or error}); "
            "give a folder that is writable and has room"
        ) from None
    return True


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file and force it to disk, so that a rename never publishes an empty one."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _publish(temporary: Path, folder: Path, is_valid: Callable[[Path], bool]) -> None:
    """Rename ``temporary`` to ``folder``; what stands there is kept if valid, else moved aside."""
    try:
        temporary.rename(folder)
        return
    except OSError:
        if not folder.exists():
            raise
    if is_valid(folder):
        return
    # Moved into a folder that is removed afterwards: whoever still maps the old files keeps them.
    aside = Path(tempfile.mkdtemp(prefix=folder.name + ".tmp-", dir=folder.parent))
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside / "stale")
    try:
        temporary.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, or go on without one where the file system has none."""
    with open(path, "a+b") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_abandoned(folder: Path) -> None:
    """Delete what a killed run left behind a day or more ago."""
    for path in folder.parent.glob(folder.name + ".tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
