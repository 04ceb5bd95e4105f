"""Host memory that saving, loading and converting take beside the tensors, as the operating system counts it."""

import ctypes
import os
import re
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from sltrain_dist.parallel.mesh import Mesh
from sltrain_dist.train import checkpoint_tensors
from sltrain_dist.train.checkpoint_async import HostCopies
from sltrain_dist.train.checkpoint_shards import Piece, read_headers, read_rows, write_file
from sltrain_dist.train.checkpoint_tensors import read_tensors, write_tensors
from tests.ranks import run_ranks

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
COUNT, ONE = 8, 1 << 24  # tensors, and bytes of each


def resident(field: str) -> int:
    """VmRSS or VmHWM, its peak, in bytes; pages of files that are mapped count too."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> int:
    """Let VmHWM begin anew; returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def measure(mesh: Mesh, folder: str) -> dict[str, int]:
    """The peak of each thing that is done, in bytes above what was resident before."""
    checkpoint_tensors.FILE_BYTES = ONE
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)  # what is freed goes back at once
    placements = [Replicate(), Replicate(), Shard(0)]
    tensors = {
        f"model.{number}": DTensor.from_local(
            torch.full((ONE // 1024, 256), float(number)), mesh.host_mesh, placements
        )
        for number in range(COUNT)
    }
    small = {"model.small": DTensor.from_local(torch.ones(3), mesh.host_mesh, placements)}
    path, again = Path(folder) / "written", Path(folder) / "again"
    for place in (path, again, Path(folder) / "first"):
        place.mkdir()
    write_tensors(Path(folder) / "first", small)  # what is imported and built once
    read_tensors(Path(folder) / "first", small)
    grown, base = {}, forget_peak()

    def done(what: str) -> None:
        nonlocal base
        grown[what] = resident("VmHWM") - base
        base = forget_peak()

    write_tensors(path, tensors)
    done("save")
    for tensor in tensors.values():
        tensor.to_local().zero_()
    read_tensors(path, tensors)
    done("load")
    assert all(bool((t.to_local() == n).all()) for n, t in enumerate(tensors.values()))
    pieces = [
        Piece(s.name, s.dtype, (0, 0), s.shape, lambda s=s: read_rows(s))
        for s in read_headers(path).values()
    ]
    write_file(again / "all.safetensors", pieces)
    done("convert")
    copies = HostCopies()
    staged = copies.fill(tensors)
    done("stage")
    for place in (1, 2):
        (Path(folder) / f"staged{place}").mkdir()
        write_tensors(Path(folder) / f"staged{place}", staged)
        staged = copies.fill(tensors)
    done("save what is staged, twice")
    return grown


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux counts it")
def test_extra_memory(tmp_path: Path) -> None:
    """Twice the largest file for a save, one for a load, one tensor for a conversion; one copy to save beside."""
    (grown,) = run_ranks(measure, 1, str(tmp_path))
    slack = ONE
    assert grown["save"] < 2 * ONE + slack, grown
    assert grown["load"] < ONE + slack, grown
    assert grown["convert"] < ONE + slack, grown
    assert grown["stage"] < COUNT * ONE + slack, grown
    assert grown["save what is staged, twice"] < 2 * ONE + slack, grown
