"""Named tensors in files, read one at a time: safetensors, whole or cut into shards, and pytorch_model.bin.

Only headers are read when files are opened, each once; ``read`` then fills one new tensor, so that the
memory of a conversion is that of its largest tensor. A checkpoint's shards carry their place in the whole
tensor in the header (train.checkpoint_tensors); shards that leave elements out, hold them twice or
contradict each other are refused. Nothing is unpickled: a .bin with anything but tensors is refused.
"""

import json
import pickle
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sltrain_dist.train.checkpoint_shards import Chunk, Stored, coverage_problem, read_rows

_PLACES = "DCP_SHARDING_INFO"  # where torch.distributed.checkpoint says which part a shard is
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class StoredError(Exception):
    """A file that cannot be read or believed; the message names it and says why, in one line."""


class TensorFiles(Protocol):
    """Tensors by name. shapes: of the whole tensors. dtypes: as stored."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str) -> Tensor:
        """A new CPU tensor in the dtype that is stored; raises StoredError."""
        ...


class Safetensors:
    """TensorFiles over safetensors files whose tensors may be parts of larger ones.

    Raises:
        StoredError: a file that cannot be read, parts of a tensor that are no partition of it or that
            differ in dtype or rank.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        parts: dict[str, list[tuple[torch.dtype, Chunk]]] = {}
        for path in paths:
            try:
                _survey(path, parts)
            except (
                OSError,
                SafetensorError,
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                RecursionError,
            ) as error:
                raise StoredError(f"{path.name}: not readable ({_line(error)})") from None
        self._stored = {name: _joined(name, found) for name, found in parts.items()}
        self.shapes = {name: stored.shape for name, stored in self._stored.items()}
        self.dtypes = {name: stored.dtype for name, stored in self._stored.items()}

    def read(self, name: str) -> Tensor:
        stored = self._stored[name]
        try:
            return read_rows(stored)
        except OSError as error:
            files = ", ".join(sorted({chunk.file.name for chunk in stored.chunks}))
            raise StoredError(f"{files}: not readable ({_line(error)})") from None


class Pickled:
    """TensorFiles over pytorch_model.bin files, mapped into memory; loaded with weights_only=True."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._tensors: dict[str, Tensor] = {}
        for path in paths:
            content = _load(path)
            if not isinstance(content, dict):
                raise StoredError(
                    f"{path.name}: holds a {type(content).__name__}, not tensors by name"
                )
            for name, tensor in content.items():
                if not isinstance(tensor, Tensor) or not isinstance(name, str):
                    raise StoredError(
                        f"{path.name}: {name!r} is a {type(tensor).__name__}, not a tensor"
                    )
                self._tensors[name] = tensor
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach().clone(memory_format=torch.contiguous_format)


def open_weights(folder: Path) -> TensorFiles:
    """The weights of a folder as HF writes them: model.safetensors, pytorch_model.bin, or either in shards.

    Raises:
        StoredError: none of them is there, a shard is missing, or one cannot be read.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.is_file():
            paths = [single]
        elif index.is_file():
            paths = _shards(index)
        else:
            continue
        return Safetensors(paths) if suffix == "safetensors" else Pickled(paths)
    raise StoredError("holds no model.safetensors or pytorch_model.bin, whole or in shards")


def _shards(index: Path) -> list[Path]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoredError(f"{index.name}: not a readable index ({_line(error)})") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise StoredError(f"{index.name}: {name!r} is no file of this folder")
        if not (index.parent / name).is_file():
            raise StoredError(f"{name}: missing, though {index.name} names it")
    return [index.parent / name for name in names]


def _load(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):  # else a .bin of before torch 1.6
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise StoredError(
            f"{path.name}: holds pickled objects that are no tensors, which are never loaded; save it as safetensors"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError) as error:
        raise StoredError(f"{path.name}: not readable ({_line(error)})") from None


def _survey(path: Path, parts: dict[str, list[tuple[torch.dtype, Chunk]]]) -> None:
    """Add what a file holds to ``parts``; safe_open has compared the header with the file before we read it."""
    with safe_open(path, framework="pt"):
        pass
    with path.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        header = json.loads(stream.read(length))
    places = json.loads((header.pop("__metadata__", None) or {}).get(_PLACES, "{}"))
    for name, entry in header.items():
        shape = tuple(entry["shape"])
        start = tuple(places[name]["saved_offsets"]) if name in places else (0,) * len(shape)
        if len(start) != len(shape) or any(type(at) is not int or at < 0 for at in start):
            raise ValueError(f"{name} says that it begins at {list(start)}")
        chunk = Chunk(path, 8 + length + entry["data_offsets"][0], start, shape)
        parts.setdefault(name, []).append((_DTYPES[entry["dtype"]], chunk))


def _joined(name: str, parts: list[tuple[torch.dtype, Chunk]]) -> Stored:
    """The whole tensor of which these are the parts; raises StoredError where they are not."""
    dtype, first = parts[0]
    for other, chunk in parts:
        if other != dtype or len(chunk.sizes) != len(first.sizes):
            raise StoredError(
                f"{chunk.file.name}: {name} is of another dtype or rank than in {first.file.name}"
            )
    chunks = tuple(chunk for _, chunk in parts)
    ends = [[at + n for at, n in zip(c.offsets, c.sizes, strict=True)] for c in chunks]
    shape = tuple(max(along) for along in zip(*ends, strict=True))
    if problem := coverage_problem(shape, [(c.offsets, c.sizes) for c in chunks]):
        raise StoredError(f"{first.file.name}: elements of {name} are {problem}")
    return Stored(name, dtype, shape, chunks)


def _line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__
