"""Where documents come from: files on this machine, or a stream of the `datasets` library.

The rest of data/ sees documents as plain strings in a fixed order. Everything that can be wrong
with a user's corpus (missing, binary, malformed, without text) is found here and said in one line.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sltrain_dist.utils.errors import UserError

# How a file's name ends -> the builder of `datasets` that reads it; None is read by plain Python,
# so that local text trains without `datasets` installed.
EXTENSIONS: dict[str, str | None] = {
    ".txt": None,
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".json": "json",
    ".json.gz": "json",
    ".parquet": "parquet",
}
PIECE_CHARACTERS = 64 * 1024  # longer text files are cut into pieces, each a document of its own
_FEW_FILES = 32  # below this many files pieces shrink, so that a held-out split still exists
_SHORTEST_PIECE = 1024
_FULLY_HASHED_BYTES = 64 * 1024 * 1024
_SAMPLED_BYTES = 1024 * 1024


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's message, for use inside a one-line error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def extension(path: Path) -> str | None:
    """The entry of EXTENSIONS that ``path`` ends with, or None."""
    name = path.name.lower()
    return max((end for end in EXTENSIONS if name.endswith(end)), key=len, default=None)


def import_datasets(corpus: str) -> Any:
    """The `datasets` library, imported only by the corpora that need it.

    Raises:
        UserError: it is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"--corpus {corpus}: only .txt files are read without the package `datasets`; "
            "pip install datasets, or convert the corpus to .txt"
        ) from None
    return datasets


@dataclass(frozen=True)
class FileCorpus:
    """Text files in a fixed order, read as often as needed.

    A document is a row of a jsonl, json or parquet file, or a whole text file; text files of more
    than ``piece_characters`` are cut at line boundaries, so that one big file still has a held-out part.
    """

    name: str  # as given by the user, for messages
    root: Path  # file names below it are part of the corpus' identity, the root itself is not
    files: tuple[Path, ...]
    skip_undecodable: bool = False  # True: a text file that is not UTF-8 is left out silently
    kind: str = "files"

    def identity(self) -> str:
        """Fingerprint of names and contents; files above 64 MiB by size, time and both ends only."""
        digest = hashlib.blake2b(digest_size=16)
        for path in self.files:
            digest.update(path.relative_to(self.root).as_posix().encode() + b"\0")
            _hash_file(digest, path, self.name)
        return digest.hexdigest()

    def documents(self) -> Iterator[str]:
        """All documents that are not blank.

        Raises:
            UserError: a file cannot be read, is not text, or has no field `text`.
        """
        piece = self._piece_characters()
        for path in self.files:
            builder = EXTENSIONS.get(extension(path) or "")
            rows = _read_rows(path, builder, self.name) if builder else self._read_text(path, piece)
            for text in rows:
                if text and not text.isspace():
                    yield text

    def _piece_characters(self) -> int:
        if len(self.files) >= _FEW_FILES:
            return PIECE_CHARACTERS
        total = sum(path.stat().st_size for path in self.files)
        return min(PIECE_CHARACTERS, max(_SHORTEST_PIECE, total // _FEW_FILES))

    def _read_text(self, path: Path, piece: int) -> Iterator[str]:
        """One text file as documents of about ``piece`` characters, never held in memory whole."""
        try:
            if path.stat().st_size <= PIECE_CHARACTERS and len(self.files) >= _FEW_FILES:
                yield _checked(path.read_text(encoding="utf-8-sig"))
                return
            rest = ""
            with open(path, encoding="utf-8-sig") as file:
                while block := _checked(file.read(piece)):
                    rest += block
                    while len(rest) > piece:
                        cut = _boundary(rest, piece)
                        yield rest[:cut]
                        rest = rest[cut:]
            yield rest
        except UnicodeDecodeError:
            if not self.skip_undecodable:
                raise UserError(
                    f"--corpus {self.name}: {path.name} is not UTF-8 text; "
                    "give text files, or convert it to UTF-8"
                ) from None
        except OSError as error:
            raise UserError(
                f"--corpus {self.name}: {path.name} cannot be read ({error.strerror}); "
                "check that it exists and may be read"
            ) from None


@dataclass(frozen=True)
class StreamCorpus:
    """A corpus read from the network or from shards as training goes, never stored as tokens."""

    name: str
    arguments: Mapping[str, Any]  # of datasets.load_dataset, without split and streaming
    train_split: str = "train"
    held_out_split: str = "validation"
    hub: bool = False  # True: check first that the hub answers, its own retries take half a minute
    kind: str = "stream"

    def identity(self) -> str:
        """Fingerprint of what is streamed: the arguments, not the contents."""
        text = repr((sorted(self.arguments.items()), self.train_split, self.held_out_split))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def open(self, split: str) -> Any:
        """A fresh datasets.IterableDataset of one split.

        Raises:
            UserError: the hub or the files cannot be reached, within about 10 s.
        """
        datasets = import_datasets(self.name)
        self.require_reachable()
        try:
            with quietly(datasets):
                return datasets.load_dataset(**self.arguments, split=split, streaming=True)
        except Exception as error:  # every back end of `datasets` raises its own kinds
            raise UserError(
                f"--corpus {self.name}: cannot be opened ({first_line(error)}); "
                "check the network or the files, or use --corpus stdlib"
            ) from None

    def require_reachable(self) -> None:
        """Raise UserError within seconds if the corpus is on the hub and the hub does not answer."""
        if self.hub:
            from sltrain_dist.data.hub import require_hub

            require_hub(f"--corpus {self.name}", "give a local file or folder, or --corpus stdlib")

    def documents(self, split: str) -> Iterator[str]:
        """Texts of one split from its beginning."""
        return texts(self.open(split), f"--corpus {self.name}")


@contextlib.contextmanager
def quietly(datasets: Any) -> Iterator[None]:
    """Let `datasets` draw no progress bars of its own inside; as before afterwards."""
    disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            datasets.enable_progress_bars()


def texts(rows: Iterable[Mapping[str, Any]], source: str) -> Iterator[str]:
    """The field `text` of every row; missing values become empty text.

    Raises:
        UserError: no field `text`, one that is not a string, or rows that cannot be read.
    """
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator, None)
        except Exception as error:  # every back end of `datasets` raises its own kinds
            raise UserError(
                f"{source}: cannot be read ({first_line(error)}); check the file and its format"
            ) from None
        if row is None:
            return
        text = row.get("text", 0)
        if text is None:
            text = ""
        if not isinstance(text, str):
            fields = ", ".join(sorted(row))
            raise UserError(
                f"{source}: rows have no string field `text` (fields: {fields}); "
                "rename the field that holds the text to `text`"
            )
        yield text


def _read_rows(path: Path, builder: str, corpus: str) -> Iterator[str]:
    """Texts of one jsonl, json or parquet file, streamed so that `datasets` writes no copy of it."""
    datasets = import_datasets(corpus)
    source = f"--corpus {corpus}: {path.name}"
    if path.stat().st_size == 0:
        return
    try:
        with quietly(datasets):
            rows = datasets.load_dataset(
                builder, data_files=[str(path)], split="train", streaming=True
            )
    except Exception as error:  # every back end of `datasets` raises its own kinds
        raise UserError(
            f"{source} cannot be read ({first_line(error)}); check the file and its format"
        ) from None
    yield from texts(rows, source)


def _checked(text: str) -> str:
    """``text`` itself, unless it holds NUL, which is valid UTF-8 but means a binary file."""
    if "\0" in text:
        raise UnicodeDecodeError("utf-8", b"", 0, 1, "NUL character")
    return text


def _boundary(text: str, limit: int) -> int:
    """Where to cut: after the last line end before ``limit``, else the last blank, else ``limit``."""
    for mark in ("\n", " "):
        cut = text.rfind(mark, limit // 2, limit)
        if cut >= 0:
            return cut + 1
    return limit


def _hash_file(digest: Any, path: Path, corpus: str) -> None:
    try:
        status = path.stat()
        digest.update(f"{status.st_size}\0".encode())
        with open(path, "rb") as file:
            if status.st_size <= _FULLY_HASHED_BYTES:
                digest.update(file.read())
                return
            digest.update(f"{status.st_mtime_ns}\0".encode())
            digest.update(file.read(_SAMPLED_BYTES))
            file.seek(-_SAMPLED_BYTES, os.SEEK_END)
            digest.update(file.read())
    except OSError as error:
        raise UserError(
            f"--corpus {corpus}: {path.name} cannot be read ({error.strerror}); "
            "check that it exists and may be read"
        ) from None
