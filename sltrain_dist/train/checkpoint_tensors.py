"""Tensors and random states on disk: torch.distributed.checkpoint over safetensors, without pickle.

torch's ``HuggingFaceStorageWriter(save_distributed=True)`` lets every rank write the shards it
holds, with their offsets in the safetensors header, and writes no ``.metadata`` pickle; its reader
collects the shards of any number of ranks for any other. Seen on torch 2.13 to hold for uneven and
empty shards, 0-dim tensors, uint8, int32 and bfloat16. Three of its limits are worked around here:

* it builds each file in host memory, twice, so tensors are spread over files of about
  ``FILE_BYTES`` and the extra memory stays at twice that size (or that of the largest shard);
* it calls fsync before the last bytes leave Python's buffer, so the caller must sync files again;
* its reader trusts the headers: a missing file would leave elements as they were. ``read_tensors``
  checks first that every element is there (and the folder's manifest is checked before that).

Nothing here knows how tensors are cut: torch asks the DTensors, on meshes of any number of axes, and
has a part that several ranks hold written by one of them.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from sltrain_dist.train.checkpoint_shards import coverage_problem

FILE_BYTES = 1 << 28  # of one rank's part in one file


class SaveError(Exception):
    """A checkpoint could not be written (disk full, quota, I/O error, host memory)."""


def reason(error: BaseException) -> str:
    """One line for an error of the operating system."""
    if isinstance(error, OSError) and error.strerror:
        name = f": {Path(error.filename).name}" if isinstance(error.filename, str) else ""
        return f"{error.strerror}{name}"
    return str(error) or type(error).__name__


def describe(tensors: dict[str, DTensor]) -> dict[str, dict[str, Any]]:
    """Global shape and dtype of every tensor, JSON-able: {name: {"shape": [...], "dtype": "float32"}}."""
    return {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in tensors.items()
    }


def _file_numbers(tensors: dict[str, DTensor]) -> dict[str, int]:
    """File number (from 1) of every tensor, by the sizes of this rank's parts.

    Torch takes the first rank's numbers for all; no rank's part of a tensor is larger than the first one's.
    """
    numbers: dict[str, int] = {}
    number, filled = 1, 0
    for name, tensor in tensors.items():
        size = tensor.to_local().nbytes
        if filled and filled + size > FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += size
    return numbers


def _collective(action: Callable[[], Any], what: str) -> None:
    """Run a DCP call; it raises on every rank when it failed on one.

    Raises:
        SaveError: all failures are of the operating system or of host memory.
        RuntimeError: any other failure, with the ranks' tracebacks.
    """
    try:
        action()
    except CheckpointException as error:
        failures = {rank: pair[0] for rank, pair in error.failures.items()}
        if all(isinstance(failure, OSError | MemoryError) for failure in failures.values()):
            rank, failure = min(failures.items(), key=lambda item: item[0])
            raise SaveError(f"{reason(failure)} (rank {rank})") from None
        raise RuntimeError(f"{what} failed: {error}") from None


def write_tensors(
    folder: Path, tensors: dict[str, DTensor], group: ProcessGroup | None = None
) -> None:
    """Write this rank's shards into ``folder``; collective over ``group`` (None: the default one).

    Raises:
        SaveError: on all ranks, when the disk failed on any.
    """
    writer = HuggingFaceStorageWriter(
        str(folder),
        fqn_to_index_mapping=_file_numbers(tensors),
        save_distributed=True,
    )
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dense = {  # safetensors refuses strided memory; only such shards are copied
        name: tensor if tensor.to_local().is_contiguous() else tensor.contiguous()
        for name, tensor in tensors.items()
    }
    _collective(
        lambda: save(dense, storage_writer=writer, planner=planner, process_group=group),
        f"writing {folder}",
    )


def own_tensor_files(folder: Path, rank: int) -> list[Path]:
    """The files ``write_tensors`` wrote for this rank, maybe none (torch numbers ranks from 1)."""
    return sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))


class _Reader(HuggingFaceStorageReader):
    """Reads the headers of all files once, where torch's would read them again for every use."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._known: Metadata | None = None

    def read_metadata(self) -> Metadata:
        """Names, dtypes, shapes and places of all chunks."""
        if self._known is None:
            self._known = super().read_metadata()
        return self._known


def read_tensors(folder: Path, tensors: dict[str, DTensor]) -> None:
    """Fill ``tensors`` in place from ``folder``, whatever layout wrote it; collective.

    Floating dtypes are converted by rounding. Names and shapes must have been checked. Beside the
    tensors, memory holds one chunk at a time.

    Raises:
        RuntimeError: elements are missing or there twice, or a file cannot be read.
    """
    reader = _Reader(folder)
    stored: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    for name, tensor in tensors.items():
        chunks = stored[name].chunks if name in stored else []
        places = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]
        if problem := coverage_problem(tuple(tensor.shape), places):
            raise RuntimeError(f"{folder}: elements of {name} are {problem}")
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        _collective(
            lambda: load(dict(tensors), storage_reader=reader, planner=planner),
            f"reading {folder}",
        )
    except SaveError as error:
        raise RuntimeError(f"reading {folder} failed: {error}") from None


def random_state() -> dict[str, Any]:
    """This rank's random states (torch CPU and current CUDA device, numpy, python), JSON-able."""
    kind, key, position, has_gauss, gauss = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else None
    version, words, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": cuda,
        "numpy": [str(kind), np.asarray(key).tolist(), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(words), next_gauss],
    }


def restore_random_state(document: dict[str, Any]) -> None:
    """Set what ``random_state`` captured."""

    def as_tensor(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

    torch.set_rng_state(as_tensor(document["torch"]))
    if document["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(as_tensor(document["cuda"]))
    kind, key, position, has_gauss, gauss = document["numpy"]
    np.random.set_state((kind, np.asarray(key, dtype=np.uint32), position, has_gauss, gauss))
    version, words, next_gauss = document["python"]
    random.setstate((version, tuple(words), next_gauss))
