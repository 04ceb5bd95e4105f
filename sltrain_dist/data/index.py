"""The tokenised corpus on disk: every document once, as a flat memory-mapped array of token ids.

A folder holds `<split>.tokens` (uint16 or uint32, every document followed by end of text),
`<split>.offsets` (uint64, where documents begin, one more than there are documents) and `index.json`.
Samples of any length and both packing modes are read from the same files.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sltrain_dist.data.storage import ensure_folder, write_synced
from sltrain_dist.data.tokenizer import Tokenizer

VERSION = 1
_BATCH_CHARACTERS = 1 << 21  # tokenised at once: enough for all cores, little memory
_BATCH_DOCUMENTS = 2048
_CHECKSUM_BYTES = 256 * 1024 * 1024  # larger files are checked by size alone

Pair = tuple[str, list[int]]  # (split, token ids of one document without end of text)


@dataclass(frozen=True)
class TokenFile:
    """One split, opened read-only.

    tokens: [tokens] uint16 or uint32 memory map; offsets: [documents + 1] uint64 memory map.
    """

    tokens: NDArray[Any]
    offsets: NDArray[np.uint64]
    eos_id: int
    pad_id: int

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1


def fingerprint(*parts: str | int) -> str:
    """Short digest of everything an index depends on."""
    text = "\0".join(str(part) for part in (VERSION, *parts))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def encode(tokenizer: Tokenizer, documents: Iterable[tuple[str, str]]) -> Iterator[Pair]:
    """Tokenise (split, document) pairs in batches, keeping their order."""
    splits: list[str] = []
    texts: list[str] = []
    characters = 0
    for split, document in documents:
        splits.append(split)
        texts.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS or len(texts) >= _BATCH_DOCUMENTS:
            yield from zip(splits, tokenizer.encode_batch(texts), strict=True)
            splits, texts, characters = [], [], 0
    yield from zip(splits, tokenizer.encode_batch(texts), strict=True)


def prepare_index(
    folder: Path, mark: str, tokenizer: Tokenizer, pairs: Callable[[], Iterable[Pair]]
) -> bool:
    """Make sure that ``folder`` holds a whole index with the fingerprint ``mark``.

    A missing, truncated, damaged or foreign one is rebuilt from ``pairs()``. Safe to call from any
    number of processes at once.

    Returns:
        True if it had to be built.

    Raises:
        UserError: the cache folder cannot be written; whatever ``pairs`` raises.
    """
    return ensure_folder(
        folder,
        lambda candidate: is_valid(candidate, mark, checksums=True),
        lambda temporary: _write(temporary, mark, tokenizer, pairs()),
    )


def read_description(folder: Path) -> dict[str, Any] | None:
    """The content of index.json, or None if there is no readable one."""
    try:
        description = json.loads((folder / "index.json").read_text())
    except (OSError, ValueError):
        return None
    return description if isinstance(description, dict) else None


def is_valid(folder: Path, mark: str, *, checksums: bool) -> bool:
    """Does ``folder`` hold the index with this fingerprint, with every file of the size it had?"""
    description = read_description(folder)
    if description is None or description.get("fingerprint") != mark:
        return False
    try:
        return all(
            (folder / name).stat().st_size == entry["size"]
            and (not checksums or _checksum(folder / name) in (None, entry["crc32"]))
            for name, entry in description["files"].items()
        )
    except (OSError, KeyError, TypeError, AttributeError):
        return False


def open_split(folder: Path, split: str) -> TokenFile:
    """Memory-map one split of an index that ``is_valid``."""
    description = read_description(folder)
    assert description is not None, folder
    tokens: NDArray[Any] = np.memmap(
        folder / f"{split}.tokens", dtype=np.dtype(description["dtype"]), mode="r"
    )
    offsets: NDArray[np.uint64] = np.memmap(
        folder / f"{split}.offsets", dtype=np.dtype("<u8"), mode="r"
    )
    return TokenFile(tokens, offsets, description["eos_id"], description["pad_id"])


class _SplitWriter:
    """Appends documents to the two files of a split."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], eos_id: int) -> None:
        self._tokens: BinaryIO = (folder / f"{split}.tokens").open("wb")
        self._offsets: BinaryIO = (folder / f"{split}.offsets").open("wb")
        self._dtype, self._eos_id = dtype, eos_id
        self.tokens, self.documents = 0, 0
        self._write_offset()

    def _write_offset(self) -> None:
        self._offsets.write(self.tokens.to_bytes(8, "little"))

    def append(self, ids: list[int]) -> None:
        self._tokens.write(np.array([*ids, self._eos_id], dtype=self._dtype).tobytes())
        self.tokens += len(ids) + 1
        self.documents += 1
        self._write_offset()

    def close(self) -> None:
        for file in (self._tokens, self._offsets):
            file.flush()
            os.fsync(file.fileno())
            file.close()


def _write(folder: Path, mark: str, tokenizer: Tokenizer, pairs: Iterable[Pair]) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    writers: dict[str, _SplitWriter] = {}
    try:
        for split, ids in pairs:
            if split not in writers:
                writers[split] = _SplitWriter(folder, split, dtype, tokenizer.eos_id)
            writers[split].append(ids)
    finally:
        for writer in writers.values():
            writer.close()
    files = [folder / f"{split}.{part}" for split in writers for part in ("tokens", "offsets")]
    description = {
        "version": VERSION,
        "fingerprint": mark,
        "dtype": dtype.str,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.fingerprint,
        "splits": {
            split: {"documents": writer.documents, "tokens": writer.tokens}
            for split, writer in writers.items()
        },
        "files": {
            path.name: {"size": path.stat().st_size, "crc32": _checksum(path)} for path in files
        },
    }
    write_synced(folder / "index.json", json.dumps(description, indent=2).encode())


def _checksum(path: Path) -> int | None:
    """CRC-32 of a file, or None where reading it all would cost too much at every start."""
    if path.stat().st_size > _CHECKSUM_BYTES:
        return None
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
