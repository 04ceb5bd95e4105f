"""8-bit optimizer state on its way to and from checkpoints.

Codes and scales belong to blocks of 256 elements as they lie in one rank's memory: FSDP2 has a buffer for
every parameter, ZeRO one for many. Where the same ranks hold the same fragments, bytes are written and read
as they are. Everywhere else the fragments say what the buffers of another layout hold, and
`train.checkpoint_quantised` decodes them and encodes the moments anew.

A state has "quantised.<moment>.<buffer>", uint8 [rows x n], and "quantised.<moment>_absmax.<buffer>", float32
[rows x blocks]: a row for every rank that holds something of its own, in the order of (tp, shard), as long as
the largest one's.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sltrain_dist.parallel.engine import as_dtensor, chunk_bounds, held_part
from sltrain_dist.parallel.mesh import Mesh
from sltrain_dist.params import Cut

QUANTISED = "quantised."  # prefix in a state
SCALES = "_absmax"  # ending of the names of scales
BLOCK = 256  # elements that share a scale: bitsandbytes' kernels know no other


def blocks(numel: int) -> int:
    """Blocks of a tensor of so many elements."""
    return -(-numel // BLOCK)


class Fragment(NamedTuple):
    """Elements [start, start + length) of what a tensor-parallel rank holds of a parameter, flattened; ``offset`` in the buffer."""

    name: str
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class Buffer:
    """One rank's 8-bit moments that lie together.

    tensors: flat and live: codes uint8 [n] as "<moment>", scales float32 [`blocks`] as "<moment>_absmax".
    largest: n of the rank that has most.
    shared: all data-parallel ranks hold the same (ZeRO stage 0).
    """

    label: str
    tensors: dict[str, Tensor]
    largest: int
    fragments: tuple[Fragment, ...]
    shared: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """Elements of each tensor on the rank that has most."""
        return {
            key: blocks(self.largest) if key.endswith(SCALES) else self.largest
            for key in self.tensors
        }

    def name(self, key: str) -> str:
        """What a state calls one of the tensors."""
        return f"{QUANTISED}{key}.{self.label}"


def buffer_state(mesh: Mesh, buffers: Iterable[Buffer], copies: bool = False) -> dict[str, DTensor]:
    """The entries of a state: ``copies`` in host memory, or else the buffers' own memory where these are as long as the longest."""
    state = {}
    for name, own, rows in _own_rows(mesh, buffers):
        own = own.to("cpu", copy=True) if copies else own
        cut = Cut(0, mesh.tp_rank, mesh.tp_size) if mesh.tp_size > 1 else None
        size = rows * (mesh.tp_size if cut else 1)
        state[name] = as_dtensor(mesh, own, torch.Size([size]), cut)
    return state


def load_buffers(mesh: Mesh, buffers: Iterable[Buffer], state: dict[str, DTensor]) -> set[str]:
    """Take the entries of `buffer_state` over; returns their names."""
    names = set()
    for buffer in buffers:
        for key, tensor in buffer.tensors.items():
            names.add(name := buffer.name(key))
            source = held_part(state[name]) if buffer.shared else state[name].to_local()
            if source.data_ptr() != tensor.data_ptr():
                tensor.copy_(source[: tensor.numel()])
    return names


def _own_rows(mesh: Mesh, buffers: Iterable[Buffer]) -> Iterator[tuple[str, Tensor, int]]:
    """(name, this rank's part along dim 0, elements of all data-parallel ranks)."""
    for buffer in buffers:
        for key, length in buffer.sizes.items():
            tensor = buffer.tensors[key]
            if buffer.shared:
                start, stop = chunk_bounds(length, mesh.shard_size, mesh.shard_rank)
                own, rows = tensor[start:stop], length
            else:
                own, rows = tensor, length * mesh.shard_size
                if tensor.numel() < length:
                    own = tensor.new_zeros(length)
                    own[: tensor.numel()] = tensor
            yield buffer.name(key), own, rows
