"""Named tensors in files, read one at a time: safetensors, whole or cut into shards, and pytorch_model.bin.

Only headers are read when files are opened; ``read`` then fills one new tensor, so that the memory of a
conversion is that of its largest tensor. A checkpoint's shards carry their place in the whole tensor in
the header (train.checkpoint_tensors). Nothing is unpickled: a .bin with anything but tensors is refused.
"""

import json
import math
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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


@dataclass(frozen=True)
class _Piece:
    """A stored tensor that is part of a whole one: where it stands on disk, and where it belongs."""

    path: Path
    start: tuple[int, ...]
    shape: tuple[int, ...]


class Safetensors:
    """TensorFiles over safetensors files whose tensors may be parts of larger ones."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._pieces: dict[str, list[_Piece]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for path in paths:
            try:
                self._survey(path)
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                raise StoredError(f"{path.name}: not readable ({_line(error)})") from None
        self.shapes = {name: _whole_shape(pieces) for name, pieces in self._pieces.items()}

    def _survey(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            places = json.loads((file.metadata() or {}).get(_PLACES, "{}"))
            for name in file.keys():  # noqa: SIM118  (not a dict)
                part: Any = file.get_slice(name)
                shape = tuple(part.get_shape())
                start = (
                    tuple(places[name]["saved_offsets"]) if name in places else (0,) * len(shape)
                )
                self._pieces.setdefault(name, []).append(_Piece(path, start, shape))
                self.dtypes[name] = _DTYPES[part.get_dtype()]

    def read(self, name: str) -> Tensor:
        pieces, shape = self._pieces[name], self.shapes[name]
        if sum(math.prod(piece.shape) for piece in pieces) != math.prod(shape):
            raise StoredError(f"{pieces[0].path.parent.name}: elements of {name} are missing")
        whole = torch.empty(shape, dtype=self.dtypes[name])
        for piece in pieces:
            place = tuple(
                slice(start, start + size)
                for start, size in zip(piece.start, piece.shape, strict=True)
            )
            try:
                with safe_open(piece.path, framework="pt") as file:
                    whole[place] = file.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise StoredError(f"{piece.path.name}: not readable ({_line(error)})") from None
        return whole


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


def _whole_shape(pieces: list[_Piece]) -> tuple[int, ...]:
    ends = [
        [start + size for start, size in zip(piece.start, piece.shape, strict=True)]
        for piece in pieces
    ]
    return tuple(max(along) for along in zip(*ends, strict=True))


def _line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__
