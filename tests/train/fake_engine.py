"""The smallest thing that keeps the Engine protocol's promises about checkpoints, over real DTensors.

Its tensors are the awkward ones: shorter than the world, cut unevenly, of every dtype a run stores.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from sltrain_dist.config import (
    DataConfig,
    EngineConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from sltrain_dist.parallel.engine import chunk_bounds
from sltrain_dist.parallel.mesh import Mesh
from sltrain_dist.train.checkpoint import Progress, Saved, load, save

SHAPES = {
    "model.embed_tokens.weight": ((7, 3), torch.float32),
    "model.layers.0.q_proj.b": ((5, 2), torch.float32),
    "model.layers.0.q_proj.values": ((3, 2, 2, 4), torch.float32),
    "model.layers.0.q_proj.scaling": ((1,), torch.float32),
    "model.lm_head.weight": ((6, 3), torch.bfloat16),
    "optimizer.exp_avg.layers.0.q_proj.b": ((5, 2), torch.float32),
    "optimizer.codes.layers.0.q_proj.b": ((10,), torch.uint8),
    "optimizer.blocks.layers.0.q_proj.b": ((2,), torch.int32),
}


def full_tensors(step: int) -> dict[str, Tensor]:
    """What the whole tensors are after ``step`` updates, bit patterns included that no float keeps by luck."""
    tensors = {}
    for number, (name, (shape, dtype)) in enumerate(SHAPES.items()):
        generator = torch.Generator().manual_seed(1000 * step + number)
        values = torch.randn(shape, generator=generator) * 100
        tensors[name] = values.abs().to(dtype) if dtype == torch.uint8 else values.to(dtype)
    return tensors


def shard(mesh: Mesh, whole: Tensor) -> DTensor:
    """This rank's part of ``whole``, cut as Shard(0) cuts."""
    start, stop = chunk_bounds(len(whole), mesh.dp_size, mesh.dp_rank)
    axes = mesh.host_mesh
    placements: list[Placement] = [Replicate()] * (axes.ndim - 1) + [Shard(0)]
    return DTensor.from_local(
        whole[start:stop].clone(),
        axes,
        placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


class FakeEngine:
    copies_state = False

    def __init__(self, mesh: Mesh, step: int, *, name: str = "fsdp", support: int = -5) -> None:
        self.mesh, self.name, self.support = mesh, name, support
        self.module: torch.nn.Module = torch.nn.Identity()
        self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        self.count = step
        self.loaded = False
        self.tensors = {key: shard(mesh, value) for key, value in full_tensors(step).items()}

    def state(self) -> dict[str, DTensor]:
        return dict(self.tensors)

    def load_state(self, state: dict[str, DTensor], scalars: dict[str, Any]) -> None:
        self.tensors, self.count, self.loaded = state, scalars["count"], True

    def buffers(self) -> list[Any]:
        return []

    def scalars(self) -> dict[str, Any]:
        return {"count": self.count}

    def support_hash(self) -> int:
        return self.support

    def replace(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.tensors[name] = shard(self.mesh, torch.zeros(shape, dtype=dtype))

    def holds(self, step: int) -> bool:
        """Whether the tensors of this rank are, byte for byte, those of ``step``."""
        expected = FakeEngine(self.mesh, step).tensors
        return self.count == step and all(
            torch.equal(_bytes(self.tensors[name]), _bytes(expected[name])) for name in SHAPES
        )


def _bytes(tensor: DTensor) -> Tensor:
    return tensor.to_local().contiguous().reshape(-1).view(torch.uint8)


def make_config(save_dir: str, keep_last: int = 0, **changes: Any) -> TrainConfig:
    """A TrainConfig whose ``changes`` go to the model or the method, by field name."""
    model = ModelConfig("fake", 7, 8, 16, 1, 2, 2, 4)
    method = MethodConfig("sltrain", rank=2)
    in_model = {key: value for key, value in changes.items() if hasattr(model, key)}
    in_method = {key: value for key, value in changes.items() if hasattr(method, key)}
    return TrainConfig(
        dataclasses.replace(model, **in_model),
        dataclasses.replace(method, **in_method),
        DataConfig(),
        OptimizerConfig(),
        EngineConfig(),
        save_dir=save_dir,
        keep_last=keep_last,
    )


SHARD = "shard-00001-model-00001-of-00001.safetensors"  # the one tensor file of one rank


def write(mesh: Mesh, run: Path, step: int, keep_last: int = 0) -> Saved:
    return save(FakeEngine(mesh, step), Progress(step, step), make_config(str(run), keep_last))


def holds(mesh: Mesh, folder: Path | None, step: int) -> bool:
    assert folder is not None
    engine = FakeEngine(mesh, 0)
    progress = load(folder, engine, make_config(str(folder.parent))).progress
    return progress.step == step and engine.holds(step)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())
