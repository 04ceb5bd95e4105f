"""Do collectives work between these ranks, and how fast is each connection?

A cable or a card at a tenth of its speed stops nothing: it makes every update of every rank as slow as itself. So
each pair of ranks is measured alone, and the slowest is named. Up to 16 ranks every pair, beyond that neighbours.
"""

import itertools
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sltrain_dist.parallel.mesh import Mesh, gather_objects

EVERY_PAIR = 16  # ranks up to which every pair is measured
_BYTES = 8 << 20  # of a message
_TIMES = 3  # the fastest counts
_WRONG = "all-reduce gave wrong sums"


@dataclass(frozen=True)
class Link:
    """A pair of ranks and the bytes a second that go through, the slower direction."""

    first: int
    second: int
    rate: float


@dataclass(frozen=True)
class Speeds:
    """all_reduce: bytes a second of one of 8 MiB, buffer over time. links: the pairs, slowest first."""

    all_reduce: float
    links: tuple[Link, ...]


def measure_links(mesh: Mesh) -> Speeds:
    """Send and time; all ranks must call it, and all get the same answer.

    Raises:
        RuntimeError: a peer that could not be reached, or sums that are wrong.
    """
    rate = _all_reduce(mesh)
    own = []
    for first, second in _pairs(mesh.world_size):
        rates = [_send(mesh, first, second), _send(mesh, second, first)]
        if mesh.rank == first:
            own.append((first, second, min(rates)))
        dist.barrier()  # one pair at a time
    everyone = itertools.chain(*gather_objects(mesh, own))
    links = sorted((Link(*found) for found in everyone), key=lambda link: link.rate)
    return Speeds(min(gather_objects(mesh, rate)), tuple(links))


def _pairs(world_size: int) -> list[tuple[int, int]]:
    if world_size <= EVERY_PAIR:
        return list(itertools.combinations(range(world_size), 2))
    return [(rank, rank + 1) for rank in range(world_size - 1)]


def _buffer(mesh: Mesh) -> torch.Tensor:
    return torch.full((_BYTES // 4,), float(mesh.rank + 1), device=mesh.device)


def _finish(mesh: Mesh) -> float:
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _all_reduce(mesh: Mesh) -> float:
    best = 0.0
    for _ in range(_TIMES):
        buffer = _buffer(mesh)
        began = _finish(mesh)
        dist.all_reduce(buffer)
        best = max(best, _BYTES / (_finish(mesh) - began))
        if not bool((buffer == mesh.world_size * (mesh.world_size + 1) / 2).all()):
            raise RuntimeError(_WRONG)
    return best


def _send(mesh: Mesh, source: int, target: int) -> float:
    """Bytes a second from one to the other, seen by either of them; others: 0.

    The target answers with four bytes, so that the sender's time is that of the whole way.
    """
    if mesh.rank not in (source, target):
        return 0.0
    best, answer = 0.0, torch.zeros(1, device=mesh.device)
    for _ in range(_TIMES):
        buffer = _buffer(mesh)
        began = _finish(mesh)
        if mesh.rank == source:
            dist.send(buffer, target)
            dist.recv(answer, target)
        else:
            dist.recv(buffer, source)
            dist.send(answer, source)
        best = max(best, _BYTES / (_finish(mesh) - began))
    return best
