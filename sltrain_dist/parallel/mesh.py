"""Processes, their devices and the few collectives the rest of the package needs.

A `Mesh` is made once and passed to whoever needs it; there is no global process-group state here.
It comes up the same way under ``torchrun``, the ``deepspeed`` launcher and a bare ``python`` (one process).

Ranks stand on three axes, tensor parallel innermost, so that its ranks share a machine:

    rank = (replicate_rank * shard_size + shard_rank) * tp_size + tp_rank

``replicate`` x ``shard`` together are data parallelism, ``dp``: every rank of it has other samples.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout

from sltrain_dist.utils.errors import FaultError, UserError

TP_AXIS, REPLICATE_AXIS, SHARD_AXIS, DP_AXIS = "tp", "replicate", "shard", "dp"
_FAKE = "fake"  # torch's name of the process group without processes
_LOOK = 0.1  # seconds between two looks into a store
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Mesh:
    """Where this process stands: its rank on every axis, its device, and the torch DeviceMesh.

    device_mesh has the axes ("tp", "replicate", "shard"), in this order: a tensor is cut for tensor
    parallelism first, and the part is cut again for data parallelism. host_mesh is the same over the
    hosts' memory, for state on its way to and from a file. dp_group and tp_group are process groups.
    """

    rank: int
    world_size: int
    local_rank: int
    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int
    device: torch.device
    device_mesh: DeviceMesh
    host_mesh: DeviceMesh
    dp_group: dist.ProcessGroup

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """The process group of the tensor-parallel axis."""
        return self.device_mesh.get_group(TP_AXIS)

    @property
    def replicate_size(self) -> int:
        """Copies of the model that FSDP2 keeps beside each other (HSDP); 1: sharded over all of dp."""
        return self.device_mesh.size(1)

    @property
    def shard_size(self) -> int:
        """Ranks that FSDP2 shards over."""
        return self.device_mesh.size(2)

    @property
    def shard_rank(self) -> int:
        """This rank's place among those FSDP2 shards over."""
        return self.dp_rank % self.shard_size

    @cached_property
    def data_mesh(self) -> DeviceMesh:
        """What `fully_shard` takes: the shard axis, or replicate x shard (HSDP)."""
        if self.replicate_size == 1:
            return self.device_mesh[SHARD_AXIS]
        return self.device_mesh[REPLICATE_AXIS, SHARD_AXIS]

    @property
    def is_first(self) -> bool:
        """Whether this is the one rank that prints and writes."""
        return self.rank == 0


def free_port() -> int:
    """A TCP port of this machine that nobody listens on at the moment of asking."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launched_world_size() -> int:
    """Ranks of this launch: 1 unless a launcher has set all of its variables (a stray WORLD_SIZE counts for nothing)."""
    complete = all(name in os.environ for name in _LAUNCHER_VARIABLES)
    return int(os.environ["WORLD_SIZE"]) if complete else 1


def launched_local_rank() -> int:
    """This process's number on its machine, before there is a mesh."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))


def _launcher_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank); for a bare ``python`` the variables of a one-process launch are set.

    They are set in ``os.environ`` because DeepSpeed reads them there.
    """
    if not all(name in os.environ for name in _LAUNCHER_VARIABLES):
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
        )
    rank = int(os.environ["RANK"])
    local_rank = int(os.environ.setdefault("LOCAL_RANK", str(rank)))
    return rank, int(os.environ["WORLD_SIZE"]), local_rank


def _device(device_type: str, local_rank: int) -> torch.device:
    """This process's device; on CUDA it becomes the current one, before the first collective."""
    if device_type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"--nproc_per_node: local rank {local_rank} has no GPU, this machine shows {count};"
            " start at most that many processes on it"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def initialise(
    timeout: float = 600.0,
    device: str | None = None,
    tensor_parallel: int = 1,
    replicate: int = 1,
    store: Store | None = None,
) -> Mesh:
    """Join the process group and return the mesh: gloo on CPU; NCCL on CUDA, with gloo beside it for CPU tensors.

    A process that has joined already gets another arrangement of the same ranks.

    Args:
        timeout: seconds after which a collective that a peer never joined raises.
        device: "cpu" or "cuda"; None takes CUDA where there is any.
        tensor_parallel: ranks that every layer is cut over.
        replicate: copies of the model that are kept beside each other.
        store: where the ranks have met already; None: at the launcher's address.

    Raises:
        UserError: more processes on this machine than GPUs; ranks that do not divide.
    """
    rank, world_size, local_rank = _launcher_environment()
    check_axes(world_size, tensor_parallel, replicate)
    device_type = device or ("cuda" if torch.cuda.is_available() else "cpu")
    own_device = _device(device_type, local_rank)
    if not dist.is_initialized():
        on_gpu = device_type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store or _meet(rank, world_size, timedelta(seconds=timeout)),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
            device_id=own_device if on_gpu else None,
        )
    mesh = _arrange(rank, world_size, local_rank, own_device, tensor_parallel, replicate)
    for axes in (
        mesh.device_mesh,
        mesh.host_mesh,
    ):  # whose groups have torch's own timeout, 30 minutes
        for group in (*axes.get_all_groups(), mesh.dp_group):
            _set_pg_timeout(timedelta(seconds=timeout), group)
    return mesh


def _meet(rank: int, world_size: int, timeout: timedelta) -> Any:
    """The store through which ranks find each other, at the launcher's address."""
    if world_size == 1:  # needs no port that a firewall or another run could block
        return dist.HashStore()  # type: ignore[attr-defined]
    meeting = dist.rendezvous("env://", rank, world_size, timeout=timeout)  # type: ignore[attr-defined]
    store, _, _ = next(meeting)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    return dist.PrefixStore(_agree(store, rank, world_size, timeout.total_seconds()), store)  # type: ignore[attr-defined]


def _agree(store: Any, rank: int, world_size: int, seconds: float) -> str:
    """A name for these very processes, in a store that torchrun's agents keep over restarts.

    What ranks that are dead have left there, their addresses first of all, must not be met. The number of the
    restart would not do: agents count their own. So rank 0 draws a name, the others sign under it, and it lists
    who did; a rank that is not in the list has met the name of those before, and looks again.

    Raises:
        FaultError: some ranks never came.
    """
    own, until = uuid.uuid4().hex, time.monotonic() + seconds
    if rank == 0:
        store.set("processes", own)
        missing = {f"{own}/{other}": other for other in range(1, world_size)}
        signed = []
        while missing:
            for key in [key for key in missing if store.check([key])]:
                signed.append(store.get(key).decode())
                del missing[key]
            if missing and time.monotonic() > until:
                ranks = ", ".join(str(other) for other in list(missing.values())[:8])
                raise FaultError(
                    f"ranks never came within {seconds:g} s (--timeout): {ranks}", True
                )
            time.sleep(_LOOK if missing else 0)
        store.set(f"{own}/all", json.dumps(signed))
        return own
    while time.monotonic() < until:
        name = store.get("processes").decode() if store.check(["processes"]) else ""
        if name:
            store.set(f"{name}/{rank}", own)
        while name and not store.check([f"{name}/all"]) and time.monotonic() < until:
            time.sleep(_LOOK)
            name = name if store.get("processes").decode() == name else ""
        if name and store.check([f"{name}/all"]) and own in json.loads(store.get(f"{name}/all")):
            return name
        time.sleep(_LOOK)
    raise FaultError(f"rank 0 never came within {seconds:g} s (--timeout)", rank == 1)


def imagine(world_size: int, tensor_parallel: int = 1, replicate: int = 1) -> Mesh:
    """The first rank of so many, on torch's fake process group: collectives return at once, with no numbers.

    For planning. The device is the CPU, and this process must not be in a process group; `close` leaves it.

    Raises:
        UserError: ranks that do not divide.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    check_axes(world_size, tensor_parallel, replicate)
    dist.init_process_group(_FAKE, store=FakeStore(), rank=0, world_size=world_size)
    mesh = _arrange(0, world_size, 0, torch.device("cpu"), tensor_parallel, replicate)
    assert (
        mesh.data_mesh.get_coordinate() is not None
    )  # made now: its numbers must not be fake tensors
    return mesh


def _arrange(
    rank: int,
    world_size: int,
    local_rank: int,
    device: torch.device,
    tensor_parallel: int,
    replicate: int,
) -> Mesh:
    """The axes and their groups, of ranks that have joined."""
    shape = (world_size // tensor_parallel // replicate, tensor_parallel)
    ranks = torch.arange(world_size).view(replicate, *shape).permute(2, 0, 1)
    names = (TP_AXIS, REPLICATE_AXIS, SHARD_AXIS)
    device_mesh = DeviceMesh(device.type, ranks, mesh_dim_names=names)
    host_mesh = device_mesh
    if device.type != "cpu":
        only_gloo = (("gloo", None),) * len(names)  # else NCCL is joined once more for each axis
        host_mesh = DeviceMesh("cpu", ranks, mesh_dim_names=names, backend_override=only_gloo)
    dp_mesh = device_mesh[SHARD_AXIS]
    if replicate > 1:
        dp_mesh = device_mesh[REPLICATE_AXIS, SHARD_AXIS]._flatten(DP_AXIS)
    return Mesh(
        rank, world_size, local_rank, rank // tensor_parallel, world_size // tensor_parallel,
        rank % tensor_parallel, tensor_parallel, device, device_mesh, host_mesh,
        dp_mesh.get_group(),
    )  # fmt: skip


def check_axes(world_size: int, tensor_parallel: int, replicate: int) -> None:
    """Refuse axes whose sizes do not multiply to the number of ranks.

    Raises:
        UserError: naming the flag.
    """
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    if world_size % tensor_parallel:
        raise UserError(
            f"--tensor_parallel {tensor_parallel}: does not divide the {ranks} of this launch; start a multiple of it"
        )
    if world_size // tensor_parallel % replicate:
        raise UserError(
            f"--replicate {replicate}: does not divide the {world_size // tensor_parallel} data-parallel ranks"
            f" ({ranks} / --tensor_parallel {tensor_parallel})"
        )


def group_store() -> Any:
    """The key-value store that the ranks met in; threads may use it beside each other."""
    store: Any = _get_default_store()
    return store


def close() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(mesh: Mesh, tensor: Tensor) -> Tensor:
    """The element-wise sum of ``tensor`` over the data-parallel ranks, as a new tensor on the mesh's device.

    Tensor-parallel ranks hold the same numbers (a loss, a count of tokens) and are not added.
    """
    result = tensor.detach().to(mesh.device, copy=True)
    if mesh.dp_size > 1:
        dist.all_reduce(result, group=mesh.dp_group)
    return result


def sum_over_all(mesh: Mesh, tensor: Tensor) -> Tensor:
    """The element-wise sum of ``tensor`` over all ranks, as a new tensor on the mesh's device."""
    result = tensor.detach().to(mesh.device, copy=True)
    if mesh.world_size > 1:
        dist.all_reduce(result)
    return result


def max_over_ranks(mesh: Mesh, tensor: Tensor) -> Tensor:
    """The element-wise maximum of ``tensor`` over all ranks, as a new tensor on the mesh's device."""
    result = tensor.detach().to(mesh.device, copy=True)
    if mesh.world_size > 1:
        dist.all_reduce(result, dist.ReduceOp.MAX)
    return result


def gather_numbers(mesh: Mesh, numbers: Sequence[float]) -> Tensor:
    """Every rank's ``numbers``, float64 [ranks, numbers], in host memory; one collective and one copy from the device."""
    own = torch.tensor([numbers], dtype=torch.float64)
    if mesh.world_size == 1 or dist.get_backend() == _FAKE:
        return own.expand(mesh.world_size, -1)
    everyone = own.new_empty(mesh.world_size, len(numbers), device=mesh.device)
    # In rows of zeros that are added up, as every version of torch and every back end can.
    everyone.zero_()[mesh.rank] = own[0]
    dist.all_reduce(everyone)
    return everyone.cpu()


def gather_objects(mesh: Mesh, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's ``value`` (JSON-able data), in rank order, on every rank.

    group: other connections between the same ranks, for a thread beside training.
    """
    if mesh.world_size == 1:
        return [value]
    if dist.get_backend() == _FAKE:
        return [value] * mesh.world_size  # imagined ranks say what this one says
    values: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(values, value, group=group)
    return values


def gather_patiently(mesh: Mesh, value: Any, hours: float = 24.0) -> list[Any]:
    """`gather_objects` for work that one rank may take long over while the others have nothing to do.

    The ordinary timeout is there to notice a dead peer soon; waiting here ends when a peer's
    connection does, or after ``hours``.
    """
    if mesh.world_size == 1:
        return [value]
    group = dist.new_group(backend="gloo", timeout=timedelta(hours=hours))
    values: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(values, value, group=group)
    dist.destroy_process_group(group)
    return values
