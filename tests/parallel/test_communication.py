"""The bytes on the wire that docs/parallelism.md and model/communication.py promise, against counted ones."""

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from sltrain_dist.config import MethodConfig, ModelConfig
from sltrain_dist.model.communication import (
    Situation,
    ends_bytes,
    layer_bytes,
    sharding_bytes,
)
from sltrain_dist.parallel.mesh import Mesh
from tests.parallel import tiny
from tests.ranks import run_ranks

PAGE = Path(__file__).parents[2] / "docs" / "parallelism.md"


class Counter(TorchDispatchMode):
    """Adds up what every collective sends a rank, by ring algorithms, and counts them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "c10d::allreduce_":
            size = dist.ProcessGroup.unbox(args[1]).size()
            self._add("all_reduce", 2 * (size - 1) / size * sum(map(_bytes, args[0])))
        elif name == "c10d::_allgather_base_":
            self._add("all_gather", _bytes(args[0]) - _bytes(args[1]))
        elif name == "c10d::_reduce_scatter_base_":
            self._add("reduce_scatter", _bytes(args[1]) - _bytes(args[0]))
        elif name == "c10d::broadcast_" and not args[0][0].is_floating_point():
            pass  # DeepSpeed compares the order of modules between ranks, in its first passes
        elif name.startswith("c10d::"):
            assert dist.ProcessGroup.unbox(args[1]).size() == 1, f"{name} is not counted"
        return func(*args, **(kwargs or {}))

    def _add(self, name: str, sent: float) -> None:
        self.sent[name] += sent


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _counted(
    _: Mesh, method: MethodConfig, tensor: int, sequence: bool, layers: int, kind: str = "fsdp"
) -> float:
    """Bytes this rank sends in the forward and backward of one micro-batch, between 2 or 4 ranks."""
    mesh = tiny.arranged(tensor)
    model = replace(tiny.SHARED, num_hidden_layers=layers)
    engine = tiny.build(mesh, kind, method=method, model=model, sequence_parallel=sequence)
    (tokens, labels), *_ = tiny.micro_batches(mesh, 0)
    engine.accumulate(engine.module(tokens, labels), last=False)  # the first call sets up
    with Counter() as counter:
        engine.accumulate(engine.module(tokens, labels), last=False)
    return sum(counter.sent.values())


def _module_by_module(mesh: Mesh) -> list[float]:
    """ZeRO-3, whose hooks hand every module another object of its input."""
    method = tiny.SHARED_METHODS["fan_in"]
    return [_counted(mesh, method, 2, True, layers, "zero3") for layers in (1, 2)]


def test_a_layer_sends_the_same_under_zero_3() -> None:
    tokens = tiny.GLOBAL_BATCH // tiny.ACCUMULATION * tiny.LENGTH
    promised = layer_bytes(
        tiny.SHARED, tiny.SHARED_METHODS["fan_in"], Situation(tokens, 2, True, 4)
    )
    for one, two in run_ranks(_module_by_module, 2):
        assert two - one == promised.total


def _cases(mesh: Mesh) -> dict[tuple[str, bool, int], float]:
    return {
        (name, sequence, layers): _counted(mesh, method, mesh.world_size, sequence, layers)
        for name, method in tiny.SHARED_METHODS.items()
        for sequence in (False, True)
        for layers in (1, 2)
    }


def test_a_layer_sends_what_is_promised() -> None:
    for counted in run_ranks(_cases, 2):
        for name, method in tiny.SHARED_METHODS.items():
            for sequence in (False, True):
                tokens = tiny.GLOBAL_BATCH // tiny.ACCUMULATION * tiny.LENGTH
                situation = Situation(tokens, 2, sequence, 4)
                one, two = (counted[name, sequence, layers] for layers in (1, 2))
                assert two - one == layer_bytes(tiny.SHARED, method, situation).total
                promised = layer_bytes(tiny.SHARED, method, situation).total
                assert one - promised == ends_bytes(tiny.SHARED, situation)


def _sharded(mesh: Mesh, layers: int) -> float:
    return _counted(mesh, tiny.SHARED_METHODS["fan_in"], 1, False, layers)


def test_sharding_sends_what_is_promised() -> None:
    (one, *_), (two, *_) = (run_ranks(_sharded, 2, layers) for layers in (1, 2))
    model = tiny.tiny_factory(
        tiny.SHARED_METHODS["fan_in"], replace(tiny.SHARED, num_hidden_layers=1)
    )(device="meta", dtype=torch.float32)
    layer = model.blocks[0]  # type: ignore[index]
    elements = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    indices = sum(_bytes(p) for p in layer.parameters() if not p.requires_grad)
    promised = sharding_bytes(elements, indices, 2, 1, 4, 4)
    assert two - one == pytest.approx(promised, rel=0.01)  # FSDP2 aligns the tensors in its buffers


def test_the_table_of_the_page_is_what_the_formulas_give() -> None:
    rows = re.findall(
        r"^\| (llama_\w+) \| (\w+) \| (\d+) \| (yes|no) \| ([\d.]+) \| ([\d.]+) \|",
        PAGE.read_text(),
        re.M,
    )
    assert len(rows) >= 6
    for name, method, tensor, sequence, activations, factors in rows:
        model = ModelConfig.load(name)
        rank = {"llama_1b": 512, "llama_7b": 1024}[name]
        kind = "full" if method == "full" else "sltrain"
        config = MethodConfig(method=kind, rank=rank)  # type: ignore[arg-type]
        sent = layer_bytes(model, config, Situation(8192, int(tensor), sequence == "yes", 2))
        assert float(activations) == pytest.approx(sent.activations / 2**20, abs=0.06)
        assert float(factors) == pytest.approx(sent.factors / 2**20, abs=0.06)
