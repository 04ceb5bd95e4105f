"""Offloading changes where things are and no number: --cpu_offload, ZeRO's offloading, --offload_activations.

On a CPU the host is where everything is; what is seen here is that torch's and DeepSpeed's offloading paths train,
save and load with our optimizer, norms and accumulators. Copies of activations are forced.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sltrain_dist.config import DataConfig, TrainConfig
from sltrain_dist.model import offload
from sltrain_dist.parallel.mesh import Mesh
from sltrain_dist.train.checkpoint import Progress, find, load, save
from tests.parallel import tiny
from tests.ranks import run_ranks

UPDATES = 4
DS = Path(__file__).parents[2] / "ds_configs"
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "masters": {"dtype": "bfloat16"},
    "pure": {"dtype": "bfloat16", "master_weights": False},
    "reduced once": {"grad_sync": "last"},
    "hybrid": {},
    "per layer": {"per_layer": True},
}
Curve = list[tuple[float, float]]


def _cpu_offload(mesh: Mesh) -> dict[tuple[str, bool], Curve]:
    found = {}
    for (name, changes), moved in itertools.product(FORMATS.items(), (False, True)):
        here = tiny.arranged(1, 2) if name == "hybrid" else mesh
        engine = tiny.build(here, "fsdp", cpu_offload=moved, **changes)
        found[name, moved] = tiny.train(engine, 0, UPDATES)
        states = engine.optimizer.state.values()
        tensors = [t for s in states for t in s.values() if isinstance(t, torch.Tensor)]
        assert all(t.device.type == "cpu" for t in tensors)
    return found


def test_cpu_offload_trains_the_same_curve_to_the_bit() -> None:
    found = run_ranks(_cpu_offload, 2)[0]
    for name in FORMATS:
        assert found[name, True] == found[name, False], name
        assert found[name, True][-1][0] < found[name, True][0][0]


RESUMES = {  # name: (engine, how it saves, how it goes on)
    "to the host": ("fsdp", {}, {"cpu_offload": True}),
    "from the host": ("fsdp", {"cpu_offload": True}, {}),
    "ZeRO to the host": ("zero3", {}, {"ds_config": "zero3_offload"}),
    "ZeRO from the host": ("zero3", {"ds_config": "zero3_offload"}, {}),
}


def _resumed(mesh: Mesh, folder: str) -> dict[str, tuple[Curve, Curve]]:
    found = {}
    for name, (kind, first, second) in RESUMES.items():
        ways = [dict(changes) for changes in (first, second)]
        for changes in ways:
            if "ds_config" in changes:
                changes["ds_config"] = json.loads((DS / f"{changes['ds_config']}.json").read_text())
        settings = TrainConfig(
            model=tiny.SMALL,
            method=tiny.METHOD,
            data=DataConfig(),
            optimizer=tiny.OPTIMIZER,
            engine=tiny.config(kind, mesh.dp_size),
            save_dir=str(Path(folder) / name),
        )
        engine = tiny.build(mesh, kind, **ways[0])
        tiny.train(engine, 0, 2)
        assert save(engine, Progress(2, 0), settings).folder is not None
        expected = tiny.train(engine, 2, 3)
        resumed = tiny.build(mesh, kind, **ways[1])
        saved = find("auto", Path(settings.save_dir), mesh).folder
        assert saved is not None
        load(saved, resumed, settings)
        found[name] = (expected, tiny.train(resumed, 2, 3))
    return found


def test_checkpoints_go_on_with_and_without_offloading(tmp_path: Path) -> None:
    for name, (expected, resumed) in run_ranks(_resumed, 2, str(tmp_path))[0].items():
        for one, other in zip(expected, resumed, strict=True):
            assert one == pytest.approx(other, rel=1e-6), name


LAYOUTS: dict[str, tuple[int, str, str, dict[str, Any]]] = {  # tp, engine, checkpointing, changes
    "fsdp": (1, "fsdp", "none", {}),
    "fsdp block": (1, "fsdp", "block", {"dtype": "bfloat16"}),
    "zero2": (1, "zero2", "none", {}),
    "tp sequence": (2, "fsdp", "none", {"sequence_parallel": True}),
    "tp sequence block": (2, "fsdp", "block", {"sequence_parallel": True}),
    "zero3 block": (1, "zero3", "block", {}),
}


def _activations(_: Mesh) -> dict[tuple[str, bool], Curve]:
    found = {}
    copies = 0
    move = offload.HostStore._move

    def counted(store: Any, tensor: torch.Tensor) -> Any:
        nonlocal copies
        copies += 1
        return move(store, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "_elsewhere", lambda tensor: tensor.numel() > 0)
        patch.setattr(offload.HostStore, "_move", counted)
        for (name, (tp, kind, checkpointing, changes)), moved in itertools.product(
            LAYOUTS.items(), (False, True)
        ):
            options = {"checkpointing": checkpointing, "offload": moved}
            method = tiny.SHARED_METHODS["fan_in"]
            engine = tiny.build(
                tiny.arranged(tp),
                kind,
                method=method,
                model=tiny.SHARED,
                options=options,
                **changes,
            )
            before = copies
            found[name, moved] = tiny.train(engine, 0, UPDATES)
            assert (copies > before) == moved
    return found


def test_offloaded_activations_train_the_same_curve_to_the_bit() -> None:
    found = run_ranks(_activations, 2)[0]
    for name in LAYOUTS:
        assert found[name, True] == found[name, False], name
