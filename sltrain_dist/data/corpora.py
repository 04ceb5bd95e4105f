"""ONE table of corpora: name -> how it is opened and which tokenizer it has by default.

A new corpus is a new row. What is not the name of a row is a path on this machine.
"""

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sltrain_dist.data.documents import EXTENSIONS, FileCorpus, StreamCorpus, extension
from sltrain_dist.utils.errors import UserError

Corpus = FileCorpus | StreamCorpus

# Tests, the IDE and installed packages are left out: what remains is about 11 MB of prose and code.
_STDLIB_EXCLUDED = {
    "__pycache__", "dist-packages", "idle_test", "idlelib", "site-packages", "test", "tests",
}  # fmt: skip


@dataclass(frozen=True)
class CorpusRow:
    """How a corpus is opened from the text after its name's colon, and its default tokenizer."""

    open: Callable[[str, str], Corpus]  # (whole value of --corpus, text after "name:")
    tokenizer: str  # "trained": byte-level BPE trained on the corpus; else a hub name
    note: str = ""


def open_corpus(value: str) -> tuple[Corpus, CorpusRow]:
    """The corpus that the value of --corpus names, and its row.

    Raises:
        UserError: no such file or folder, nothing readable in it, or an unknown kind of file.
    """
    name, _, argument = value.partition(":")
    row = CORPORA.get(name)
    if row is None or name == "path":
        row, argument = CORPORA["path"], value
    return row.open(value, argument), row


def _open_stdlib(value: str, argument: str) -> FileCorpus:
    if argument:
        raise UserError(f"--corpus {value}: stdlib takes no argument; give --corpus stdlib")
    root = Path(sysconfig.get_path("stdlib"))
    files = tuple(
        path
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix())
        if _STDLIB_EXCLUDED.isdisjoint(path.relative_to(root).parts) and path.is_file()
    )
    if not files:
        raise UserError(
            f"--corpus stdlib: no .py files under {root}, this Python ships its library compiled; "
            "give a file or folder of text as --corpus"
        )
    return FileCorpus(value, root, files, skip_undecodable=True)


def _open_path(value: str, argument: str) -> FileCorpus:
    path = Path(argument).expanduser()
    known = ", ".join(EXTENSIONS)
    try:
        exists = bool(argument) and path.exists()
        found = [
            file
            for file in (path.rglob("*") if exists and path.is_dir() else [])
            if extension(file) and file.is_file() and not file.name.startswith(".")
        ]
    except OSError as error:
        raise UserError(
            f"--corpus {value}: cannot be read ({error.strerror}); give a path you may read"
        ) from None
    if exists and path.is_dir():
        if not found:
            raise UserError(
                f"--corpus {value}: the folder holds no file of a known kind; put {known} files there"
            )
        files = sorted(found, key=lambda file: file.relative_to(path).as_posix())
        return FileCorpus(value, path, tuple(files))
    if not exists:
        names = ", ".join(name for name in CORPORA if name != "path")
        raise UserError(
            f"--corpus {value}: no such file or folder; give an existing path, or one of {names}"
        )
    if not extension(path):
        raise UserError(
            f"--corpus {value}: unknown kind of file {path.suffix or path.name!r}; known are {known}"
        )
    return FileCorpus(value, path.parent, (path,))


def _open_c4(value: str, argument: str) -> StreamCorpus:
    """English C4 from the hub, or `c4:FOLDER` from a mirror of its files on this machine."""
    if not argument:
        return StreamCorpus(value, {"path": "allenai/c4", "name": "en"}, hub=True)
    folder = Path(argument).expanduser()
    if not list(folder.glob("c4-train*.json.gz")) and (folder / "en").is_dir():
        folder = folder / "en"
    shards = {
        split: sorted(str(path) for path in folder.glob(f"c4-{split}*.json.gz"))
        for split in ("train", "validation")
    }
    missing = [split for split, files in shards.items() if not files]
    if missing:
        raise UserError(
            f"--corpus {value}: no c4-{missing[0]}*.json.gz in {folder}; "
            "give the folder of a C4 mirror that has both splits"
        )
    return StreamCorpus(value, {"path": "json", "data_files": shards})


CORPORA: dict[str, CorpusRow] = {
    "stdlib": CorpusRow(_open_stdlib, "trained", note="text of Python's own standard library"),
    "path": CorpusRow(_open_path, "trained", note="a file or folder of " + ", ".join(EXTENSIONS)),
    "c4": CorpusRow(_open_c4, "t5-base", note="allenai/c4 streamed; c4:FOLDER streams a mirror"),
}
