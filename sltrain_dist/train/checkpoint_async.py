"""Saving beside training: the shards are copied to host memory, a thread writes them.

The copy is the only extra memory, as many bytes as this rank's shards, and the same memory serves every save
(HostCopies); an engine whose state is a copy anyway (ZeRO) costs nothing more than a synchronous save. One
save is in flight at most: the next one waits for it before it copies. The thread talks to the other ranks
over a gloo group of its own, so that it never stands between the collectives of training.
"""

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from sltrain_dist.config import TrainConfig
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.parallel.mesh import Mesh, gather_objects
from sltrain_dist.train.checkpoint_room import available_memory
from sltrain_dist.train.checkpoint_tensors import FILE_BYTES
from sltrain_dist.train.checkpoint_write import Progress, Saved, Staged, stage, store
from sltrain_dist.train.summary import human_bytes

_ALIGNMENT = 64  # bytes, of every tensor in the staged copy
_SHARE = 0.9  # of the memory that is available, at most
_WRITING = 2 * FILE_BYTES  # host memory a rank needs to build a file (checkpoint_tensors)
_PATIENCE = timedelta(
    hours=24
)  # ranks wait for the slowest disk; a peer that died is noticed at once


class HostCopies:
    """Host memory for one copy of this rank's shards; pinned where they come from a GPU."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._copies: dict[str, Tensor] = {}
        self._pinned = False

    @property
    def nbytes(self) -> int:
        """Bytes held; up to 63 more for each tensor than the shards have."""
        return self._memory.nbytes

    @torch.no_grad()
    def fill(self, tensors: dict[str, DTensor]) -> dict[str, DTensor]:
        """Copy the local parts; done when it returns. The result lives until the next call."""
        own = {name: tensor.to_local().detach() for name, tensor in tensors.items()}
        if not self._fits(own):
            self._allocate(own)
        for name, local in own.items():
            self._copies[name].copy_(local, non_blocking=True)
        if any(local.is_cuda for local in own.values()):
            torch.cuda.current_stream().synchronize()
        # Not from_local, which would move the copy to the device of the mesh.
        return {
            name: DTensor(self._copies[name], tensor._spec, requires_grad=False)
            for name, tensor in tensors.items()
        }

    def release(self) -> None:
        """Give the memory back."""
        self._copies = {}
        if self._pinned:
            if int(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())):
                _forget_error()
            self._pinned = False
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _fits(self, own: dict[str, Tensor]) -> bool:
        return self._copies.keys() == own.keys() and all(
            (copy.shape, copy.dtype) == (own[name].shape, own[name].dtype)
            for name, copy in self._copies.items()
        )

    def _allocate(self, own: dict[str, Tensor]) -> None:
        self.release()
        places, end = {}, 0
        for name, local in own.items():
            places[name] = end
            end += -(-local.nbytes // _ALIGNMENT) * _ALIGNMENT
        # One piece, registered by itself: torch's own pinned memory comes in powers of two.
        self._memory = torch.empty(end, dtype=torch.uint8)
        if end and any(local.is_cuda for local in own.values()):
            code = torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), end, 1)
            self._pinned = int(code) == 0  # else copied more slowly, that is all
            if not self._pinned:
                _forget_error()
        whole = self._memory.numpy()
        for name, local in own.items():
            # By way of numpy every copy has a storage of its own; torch's writer would clone a part of one.
            part = torch.from_numpy(whole[places[name] : places[name] + local.nbytes])
            self._copies[name] = part.view(local.dtype).view(local.shape)


def _forget_error() -> None:
    """Clear the error that a failed call of the CUDA runtime left behind for this thread.

    The runtime keeps its code until it is asked for, and torch asks after every kernel that it launches:
    the next one of training would raise what is no fault of its own. torch has no call for that question
    alone, so a kernel launched for nothing asks it; an error that lasts is raised again by the next kernel.
    """
    with contextlib.suppress(RuntimeError):
        torch.empty(1, device="cuda").fill_(1.0)


def no_room(mesh: Mesh, size: int) -> str | None:
    """Why the hosts have no room for copies of ``size`` bytes on this rank, or None; collective.

    The ranks of a host share its memory: their copies must fit together, beside what writing takes.
    """
    everyone = gather_objects(mesh, (socket.gethostname(), size + _WRITING, available_memory()))
    for host in dict.fromkeys(name for name, _, _ in everyone):
        needed = sum(need for name, need, _ in everyone if name == host)
        free = [available for name, _, available in everyone if name == host]
        if any(available is None for available in free):
            return "psutil is not installed, which tells how much memory is free"
        if needed > min(free) * _SHARE:
            return (
                f"the copies of all ranks on {host} need {human_bytes(needed)} of host memory,"
                f" {human_bytes(min(free))} are available"
            )
    return None


class Saver:
    """The saves of a run, beside training or, where that is not wanted or has no room, between updates.

    Methods return lines for the user; all but ``poll`` are collective. As a context it ends in order:
    a save in flight is waited for even when training failed.
    """

    def __init__(
        self,
        mesh: Mesh,
        config: TrainConfig,
        ended: Callable[[int, Saved, float], None] = lambda step, saved, seconds: None,
    ) -> None:
        """``ended``: called with step, outcome and seconds of every save, in the training thread."""
        self.mesh, self.config, self._told = mesh, config, ended
        self.stands = True  # whether the last save that ended is on the disk
        self.copies = HostCopies()
        self._asynchronous: bool | None = None  # decided at the first save
        self._group: dist.ProcessGroup | None = None
        self._flight: _Flight | None = None

    def save(self, engine: Engine, progress: Progress) -> list[str]:
        """Save, or begin to; on return the engine may go on training."""
        lines = [] if self._asynchronous is not None else self._decide(engine)
        if self._flight is not None:
            began, ended = time.perf_counter(), self._flight.ended
            done = self.wait()
            if not ended:
                waited = time.perf_counter() - began
                lines.append(
                    f"step {progress.step}: waited {waited:.1f} s for the checkpoint before this one"
                )
            lines += done
        staged = stage(engine, progress, self.config)
        if not self._asynchronous:
            folder, keep = Path(self.config.save_dir), self.config.keep_last
            began = time.perf_counter()
            saved = store(staged, folder, keep, self.mesh)
            return lines + self._report(staged.step, saved, time.perf_counter() - began)
        if not engine.copies_state:
            staged = dataclasses.replace(staged, tensors=self.copies.fill(staged.tensors))
        self._flight = _Flight(staged, self.config, self.mesh, self._group)
        return lines

    @property
    def flying(self) -> bool:
        """Whether a save is on its way whose outcome is not known yet."""
        return self._flight is not None

    def poll(self) -> list[str]:
        """The outcome of a save that has ended since; raises what its thread raised. Not collective."""
        return self.wait() if self._flight is not None and self._flight.ended else []

    def wait(self) -> list[str]:
        """The outcome of the save in flight, once it has ended; raises what its thread raised."""
        flight, self._flight = self._flight, None
        if flight is None:
            return []
        return self._report(flight.step, flight.result(), flight.seconds)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the save in flight, though not forever for ranks that may be gone, and close the group."""
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.join(self.config.timeout)
            self._last_words(flight)
        if flight is None or flight.ended:
            self.copies.release()
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None

    def _report(self, step: int, saved: Saved, seconds: float) -> list[str]:
        self.stands = saved.folder is not None
        self._told(step, saved, seconds)
        lines = [f"warning: {warning}" for warning in saved.warnings]
        return [*lines, f"step {step}: saved {saved.folder}"] if self.stands else lines

    def _last_words(self, flight: "_Flight") -> None:
        """Tell how a save ended while another exception is on its way: none is raised."""
        unsaved = f"warning: the checkpoint of step {flight.step} was not saved"
        if not flight.ended:
            print(f"{unsaved}: its write had not ended after {self.config.timeout:g} s", flush=True)
        elif flight.error is not None:
            print(f"{unsaved}: {flight.error!r}", flush=True)
        elif self.mesh.is_first:
            lines = self._report(flight.step, flight.result(), flight.seconds)
            print("\n".join(lines), flush=True)

    def _decide(self, engine: Engine) -> list[str]:
        """Settle for the run whether saves are asynchronous; at most one line."""
        asked = self.config.async_save
        self._asynchronous = False
        if asked == "no":
            return []
        if asked == "auto" and self.mesh.device.type == "cpu":
            return ["checkpoints are written between updates (on a CPU, --async_save auto)"]
        size, problem = 0, None
        if not engine.copies_state:
            size = sum(tensor.to_local().nbytes for tensor in engine.state().values())
            problem = no_room(self.mesh, size)
        if problem is not None:
            kind = "warning: " if asked == "yes" else ""
            return [
                f"{kind}--async_save {asked}: {problem}; checkpoints are written between updates"
            ]
        self._asynchronous = True
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        takes = f"; the copy takes {human_bytes(size)} of host memory a rank" if size else ""
        return [f"checkpoints are written beside training{takes}"]


class _Flight:
    """A save that a thread carries out."""

    def __init__(
        self, staged: Staged, config: TrainConfig, mesh: Mesh, group: dist.ProcessGroup | None
    ) -> None:
        self.step = staged.step
        self.seconds = 0.0  # from the copy to the end of writing
        self.error: BaseException | None = None
        self._saved: Saved | None = None
        self._thread = threading.Thread(
            target=self._run, args=(staged, config, mesh, group), name="checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether ``result`` would not wait."""
        return not self._thread.is_alive()

    def join(self, seconds: float) -> None:
        """Wait for the end, at most so long."""
        self._thread.join(seconds)

    def result(self) -> Saved:
        """The outcome; waits for it, and raises what the thread raised."""
        self._thread.join()
        if self.error is not None:
            raise self.error
        assert self._saved is not None
        return self._saved

    def _run(
        self, staged: Staged, config: TrainConfig, mesh: Mesh, group: dist.ProcessGroup | None
    ) -> None:
        began = time.perf_counter()
        try:
            if mesh.device.type == "cuda":  # a new thread begins on device 0
                torch.cuda.set_device(mesh.device)
                torch.cuda.set_stream(torch.cuda.Stream())  # torch's writer waits for its stream
            with torch.no_grad():
                self._saved = store(staged, Path(config.save_dir), config.keep_last, mesh, group)
        except BaseException as error:  # raised again by result(), in the training thread
            self.error = error
        finally:
            self.seconds = time.perf_counter() - began
