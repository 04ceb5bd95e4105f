"""The safetensors files of a checkpoint, read and written without engines, processes or torch's planner.

A file is 8 bytes of length, a JSON header and the data. A checkpoint's tensors are cut into chunks, boxes
of any number of dimensions, spread over its files; where a chunk begins in its tensor stands in the
header under torch's key ``DCP_SHARDING_INFO``. Here the headers become one table, any rows of a tensor
are put together from the chunks, and a file is written piece by piece: nothing larger than what is asked for
is ever in memory.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    DTYPE_MAP,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    SAVED_OFFSETS_KEY,
)

SUFFIX = ".safetensors"
_NAMES = {dtype: name for name, dtype in DTYPE_MAP.items()}
_LARGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it
Box = tuple[tuple[int, ...], tuple[int, ...]]  # where it begins in its tensor, its sizes


class FileError(Exception):
    """A file that is no safetensors file of a checkpoint; the message names it and the reason."""


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: ``begin`` is the position of its row-major bytes in ``file``."""

    file: Path
    begin: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint: its dtype, the smallest shape that holds all chunks, and these."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def files(self) -> list[str]:
        """Names of the files that hold elements of it."""
        return sorted({chunk.file.name for chunk in self.chunks if math.prod(chunk.sizes)})


def coverage_problem(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """Why ``boxes`` are no partition of a tensor of ``shape`` ("missing", "there twice", "out of bounds"), or None."""
    if not all(_inside(shape, *box) for box in boxes):
        return "out of bounds"
    filled = [box for box in boxes if math.prod(box[1])]
    count = sum(math.prod(sizes) for _, sizes in filled)
    if count < math.prod(shape):
        return "missing"
    if len(filled) > 1:
        low = torch.tensor([offsets for offsets, _ in filled])
        high = low + torch.tensor([sizes for _, sizes in filled])
        apart = (low[:, None] >= high) | (high[:, None] <= low)
        if int(apart.any(dim=2).sum()) != len(filled) * (len(filled) - 1):
            return "there twice"
    return "there twice" if count > math.prod(shape) else None


def _inside(shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    return len(offsets) == len(sizes) == len(shape) and all(
        0 <= low <= low + size <= end for low, size, end in zip(offsets, sizes, shape, strict=True)
    )


def _counts(values: Any) -> tuple[int, ...]:
    """A list of a header whose numbers are sizes or positions; ValueError where they cannot be."""
    if not isinstance(values, list) or any(type(v) is not int or v < 0 for v in values):
        raise ValueError(f"{values!r} are no sizes or positions")
    return tuple(values)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A file's header and the position at which its data begin; raises FileError, OSError."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _LARGEST_HEADER):
            raise FileError(f"{path.name}: not a whole safetensors file")
        try:
            header = json.loads(stream.read(length))
            return dict(header), 8 + length
        except (ValueError, TypeError, RecursionError):
            raise FileError(f"{path.name}: its header is no JSON object") from None


def _chunks(path: Path) -> Iterable[tuple[str, torch.dtype, Chunk]]:
    """(name, dtype, chunk) of everything in a file; raises FileError, OSError."""
    header, begin = _header(path)
    try:
        sharding = json.loads(header.pop("__metadata__", {}).get(CUSTOM_METADATA_KEY, "{}"))
        for name, entry in header.items():
            sizes = _counts(entry["shape"])
            offsets = (0,) * len(sizes)
            if sharding:
                offsets = _counts(sharding[name][SAVED_OFFSETS_KEY])
            first, last = _counts(entry["data_offsets"])
            dtype = DTYPE_MAP[entry["dtype"]]
            if last - first != math.prod(sizes) * dtype.itemsize or len(offsets) != len(sizes):
                raise FileError(f"{path.name}: the header's entry of {name} contradicts itself")
            if begin + last > path.stat().st_size:
                raise FileError(f"{path.name}: the data of {name} end behind the file")
            yield name, dtype, Chunk(path, begin + first, offsets, sizes)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FileError(f"{path.name}: not of this format ({type(error).__name__})") from None


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor in the safetensors files of ``folder``, by name, in the files' order.

    Raises:
        FileError: a file is not of this format, or two files disagree about a tensor.
        OSError: a file cannot be read.
    """
    found: dict[str, tuple[torch.dtype, list[Chunk]]] = {}
    for path in sorted(folder.glob("*" + SUFFIX)):
        for name, dtype, chunk in _chunks(path):
            known, chunks = found.setdefault(name, (dtype, []))
            if known != dtype or (chunks and len(chunks[0].sizes) != len(chunk.sizes)):
                raise FileError(f"{path.name}: {name} has another dtype or rank in another file")
            chunks.append(chunk)
    tensors = {}
    for name, (dtype, chunks) in found.items():
        ends = [[o + s for o, s in zip(c.offsets, c.sizes, strict=True)] for c in chunks]
        shape = tuple(max(column) for column in zip(*ends, strict=True))
        tensors[name] = Stored(name, dtype, shape, tuple(chunks))
    return tensors


def read_rows(stored: Stored, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows [start, stop) along dim 0, in host memory; all by default. Rows of every chunk are contiguous in its file.

    Raises:
        OSError: a file cannot be read to the end.
    """
    rows = stored.shape[0] if stored.shape else 1
    stop = rows if stop is None else min(stop, rows)
    start = min(start, stop)
    out = torch.empty((stop - start, *stored.shape[1:]), dtype=stored.dtype)
    for chunk in stored.chunks:
        offsets, sizes = chunk.offsets or (0,), chunk.sizes or (1,)
        first, last = max(start, offsets[0]), min(stop, offsets[0] + sizes[0])
        if first >= last or not math.prod(sizes):
            continue
        begin = chunk.begin + (first - offsets[0]) * math.prod(sizes[1:]) * stored.dtype.itemsize
        inner = [slice(o, o + s) for o, s in zip(offsets[1:], sizes[1:], strict=True)]
        target = out[(slice(first - start, last - start), *inner)]
        if target.is_contiguous():
            _read(chunk.file, begin, target)
        else:
            part = torch.empty(target.shape, dtype=target.dtype)
            _read(chunk.file, begin, part)
            target.copy_(part)
    return out.view(stored.shape) if not stored.shape else out


def _read(path: Path, begin: int, target: Tensor) -> None:
    """Fill a contiguous tensor from the bytes at ``begin``."""
    with path.open("rb", buffering=0) as stream:
        stream.seek(begin)
        rest = target.view(-1).view(torch.uint8).numpy().data
        while rest:
            count = stream.readinto(rest)
            if not count:
                raise OSError(f"{path.name} ends too early")
            rest = rest[count:]


@dataclass(frozen=True)
class Piece:
    """What ``write_file`` writes of one tensor: a box of it, made by ``values`` when its turn has come."""

    name: str
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    values: Callable[[], Tensor]


def write_file(path: Path, pieces: Iterable[Piece]) -> None:
    """Write a new safetensors file as torch's reader expects it, one piece in memory at a time; raises OSError."""
    # Wide elements first, so that all of them are aligned.
    ordered = sorted(pieces, key=lambda piece: (-piece.dtype.itemsize, piece.name))
    sharding = {piece.name: {SAVED_OFFSETS_KEY: list(piece.offsets)} for piece in ordered}
    header: dict[str, Any] = {
        "__metadata__": {
            CUSTOM_METADATA_KEY: json.dumps(sharding),
            DCP_VERSION_KEY: str(HF_DCP_VERSION),
            FORMAT_KEY: FORMAT_VALUE,
        }
    }
    end = 0
    for piece in ordered:
        begin, end = end, end + math.prod(piece.sizes) * piece.dtype.itemsize
        header[piece.name] = {
            "dtype": _NAMES[piece.dtype],
            "shape": list(piece.sizes),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for piece in ordered:
            values = piece.values()
            assert values.dtype == piece.dtype, piece.name
            assert tuple(values.shape) == piece.sizes, piece.name
            stream.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del values  # before the next one is made
