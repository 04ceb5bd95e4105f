"""Tensors cut on meshes of several axes, as tensor parallelism cuts them: written once, read on any other mesh."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from sltrain_dist.parallel.mesh import Mesh, close, gather_objects, initialise
from sltrain_dist.train import checkpoint_tensors
from sltrain_dist.train.checkpoint_shards import coverage_problem, read_headers, read_rows
from sltrain_dist.train.checkpoint_tensors import own_tensor_files, read_tensors, write_tensors
from tests.ranks import run_ranks

R = Replicate()
CUTS: dict[str, tuple[tuple[int, ...], torch.dtype, tuple[Placement, Placement]]] = {
    "a.rows": ((7, 6), torch.float32, (Shard(0), Shard(0))),
    "b.columns": ((5, 6), torch.float32, (Shard(1), Shard(0))),
    "c.uneven": ((3, 5, 2), torch.bfloat16, (Shard(1), Shard(0))),
    "d.replicated_rows": ((9,), torch.float32, (R, Shard(0))),
    "e.single": ((1,), torch.float32, (R, Shard(0))),
    "f.everywhere": ((4, 3), torch.float32, (R, R)),
    "g.codes": ((11,), torch.uint8, (Shard(0), R)),
    "h.short": ((1, 8), torch.int32, (Shard(1), Shard(0))),
    "i.last": ((2, 3, 8), torch.float32, (Shard(2), Shard(0))),
}


def full(name: str) -> Tensor:
    shape, dtype, _ = CUTS[name]
    generator = torch.Generator().manual_seed(list(CUTS).index(name))
    return (torch.rand(shape, generator=generator) * 200).to(dtype)


def cut(shape: tuple[int, int], names: list[str], fill: bool = True) -> dict[str, DTensor]:
    """The tensors on a mesh of ``shape``: whole values, or zeros to be read into."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("tp", "shard"))
    made = {}
    for name in names:
        whole = full(name) if fill else torch.zeros_like(full(name))
        made[name] = distribute_tensor(whole, mesh, CUTS[name][2], src_data_rank=None)
    return made


def write_on_two_by_two(mesh: Mesh, folder: str) -> list[int]:
    """Everything, then a replicated tensor alone; returns how many files each rank wrote of that."""
    checkpoint_tensors.FILE_BYTES = 100  # several files a rank, and not the same on all
    for name, tensors in (("all", list(CUTS)), ("one", ["f.everywhere"])):
        path = Path(folder) / name
        if mesh.is_first:
            path.mkdir()
        gather_objects(mesh, None)
        write_tensors(path, cut((2, 2), tensors))
        own = {file.name for file in own_tensor_files(path, mesh.rank)}
        everyone = gather_objects(mesh, own)
        assert sum(map(len, everyone)) == len(set().union(*everyone))  # nobody claims another's
        assert set().union(*everyone) == {file.name for file in path.iterdir()}
    for shape in ((4, 1), (1, 4), (2, 2)):
        read_back(f"{folder}/all", shape)
    read_back(f"{folder}/one", (4, 1), ["f.everywhere"])
    return [len(files) for files in everyone]


def read_back(folder: str, shape: tuple[int, int], names: list[str] | None = None) -> None:
    names = names or list(CUTS)
    tensors = cut(shape, names, fill=False)
    read_tensors(Path(folder), tensors)
    for name, expected in cut(shape, names).items():
        assert torch.equal(tensors[name].to_local(), expected.to_local()), (name, shape)


def test_two_by_two_to_four_by_one_one_by_four_and_one(tmp_path: Path) -> None:
    files = run_ranks(write_on_two_by_two, 4, str(tmp_path))[0]
    assert sorted(files) == [0, 0, 0, 1]  # a replicated tensor is written by one rank
    initialise(device="cpu")
    read_back(str(tmp_path / "all"), (1, 1))
    close()
    stored = read_headers(tmp_path / "all")
    assert stored.keys() == CUTS.keys()
    for name, tensor in stored.items():
        places = [(chunk.offsets, chunk.sizes) for chunk in tensor.chunks]
        assert coverage_problem(CUTS[name][0], places) is None, name
        assert torch.equal(read_rows(tensor), full(name)), name
        assert torch.equal(read_rows(tensor, 1, 2), full(name)[1:2]), name
    assert len(list((tmp_path / "all").iterdir())) > 4


@pytest.mark.parametrize(
    ("boxes", "problem"),
    [
        ([((0, 0), (2, 3))], None),
        ([((0, 0), (2, 1)), ((0, 1), (1, 2)), ((1, 1), (1, 2)), ((2, 3), (0, 0))], None),
        ([((0, 0), (2, 1)), ((0, 1), (1, 2))], "missing"),
        ([], "missing"),
        ([((0, 0), (2, 3)), ((0, 0), (2, 3))], "there twice"),
        ([((0, 0), (2, 2)), ((1, 1), (1, 2))], "there twice"),  # as many as there should be
        ([((0, 0), (2, 2)), ((0, 3), (2, 1))], "out of bounds"),
    ],
)
def test_every_element_once(boxes: list, problem: str | None) -> None:
    assert coverage_problem((2, 3), boxes) == problem


@pytest.mark.parametrize(
    ("shape", "boxes"),
    [
        ((10,), [((5,), (10,))]),
        ((2, 5), [((0, 0), (5, 2))]),
        ((10,), [((-5,), (5,)), ((0,), (5,))]),
        ((4,), [((0,), (4,)), ((3,), (-1,))]),
        ((6,), [((0, 0), (2, 3))]),
    ],
)
def test_as_many_elements_in_another_place(shape: tuple[int, ...], boxes: list) -> None:
    assert coverage_problem(shape, boxes) == "out of bounds"
