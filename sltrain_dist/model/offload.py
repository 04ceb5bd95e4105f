"""--offload_activations: what blocks keep for backward waits in pinned host memory, and is back one block ahead.

torch's own `autograd.graph.save_on_cpu` copies on the stream that computes, both ways, so that products wait for
the bus, and takes parameters along. Here a stream of its own copies out while the block goes on, and when backward reaches a
block the copies of the block before it start. Under checkpointing "block" one tensor a block travels, its input.

Parameters stay: they are somewhere already. So do tensors under 1 MiB, and all tensors on a CPU, which is host memory.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SMALLEST = 1 << 20  # bytes; below it launching the copy takes longer than the copy


def _elsewhere(tensor: Tensor) -> bool:
    """Whether ``tensor`` is worth moving to the host."""
    return tensor.device.type != "cpu" and tensor.untyped_storage().nbytes() >= _SMALLEST


class _Moved:
    """One storage in host memory. back: its copy on the device, there once ``arrived`` (on a GPU) has happened."""

    def __init__(self, host: Tensor, device: torch.device, block: int) -> None:
        self.host, self.device, self.block = host, device, block
        self.back: Tensor | None = None
        self.arrived: Any = None


class HostStore:
    """What the blocks of one forward pass keep; made for every pass, and gone with its graph."""

    def __init__(self, device: torch.device) -> None:
        self._stream = _side_stream(device) if device.type == "cuda" else None
        self._blocks: list[list[weakref.ref[_Moved]]] = []
        # of the block under way: storages by address, with a tensor that keeps them from being reused
        self._sources: dict[int, tuple[Tensor, _Moved]] = {}
        self._parameters: set[int] = set()
        self._module: nn.Module | None = None

    @contextlib.contextmanager
    def block(self, module: nn.Module | None) -> Iterator[None]:
        """While this is open, what is saved for backward belongs to the next block.

        module: whose parameters are among it, as plain tensors; None: none are.
        """
        self._blocks.append([])
        self._module = module
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._sources.clear()
            self._parameters.clear()

    def _pack(self, tensor: Tensor) -> Any:
        if not _elsewhere(tensor) or self._is_parameter(tensor):
            return tensor
        place = (tensor.shape, tensor.stride(), tensor.storage_offset())
        storage = tensor.untyped_storage().data_ptr()
        if storage not in self._sources:
            moved = self._move(tensor)
            self._sources[storage] = (tensor, moved)
            self._blocks[-1].append(weakref.ref(moved))
        return self._sources[storage][1], place

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        moved, (shape, stride, offset) = packed
        for number in (moved.block, moved.block - 1):
            for reference in self._blocks[number] if number >= 0 else ():
                other = reference()
                if other is not None and other.back is None:
                    self._fetch(other)
        assert moved.back is not None
        if moved.arrived is not None:
            current = torch.cuda.current_stream(moved.device)
            current.wait_event(moved.arrived)
            moved.back.record_stream(current)
        found: Tensor = moved.back.as_strided(shape, stride, offset)
        return found

    def _is_parameter(self, tensor: Tensor) -> bool:
        if self._module is None:
            return False
        if not self._parameters:  # only now: engines gather them when the block begins
            parameters = self._module.parameters()
            self._parameters = {p.untyped_storage().data_ptr() for p in parameters}
        return tensor.untyped_storage().data_ptr() in self._parameters

    def _move(self, tensor: Tensor) -> _Moved:
        """Start copying all of the storage of ``tensor`` to the host."""
        elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        flat = tensor.detach().as_strided((elements,), (1,), 0)
        pinned = self._stream is not None
        host = torch.empty(elements, dtype=tensor.dtype, pin_memory=pinned)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):  # without effect where there is none
            host.copy_(flat, non_blocking=pinned)
        if self._stream is not None:
            flat.record_stream(self._stream)
        return _Moved(host, tensor.device, len(self._blocks) - 1)

    def _fetch(self, moved: _Moved) -> None:
        """Start copying back; after the copy out, which is on the same stream."""
        with torch.cuda.stream(self._stream):
            moved.back = moved.host.to(moved.device, non_blocking=True, copy=True)
        if self._stream is not None:
            moved.arrived = self._stream.record_event()


_streams: dict[torch.device, Any] = {}


def _side_stream(device: torch.device) -> Any:
    """The stream for copies to and from the host, one a device."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
