"""One update of the real model and engine on fake tensors, at any number of ranks: its bytes, without memory.

Everything is what pretrain builds (model, loss, paths, engine, optimizer, loop.update), but for initial
values, which nobody reads. The device is the CPU: torch for CPUs has no autograd for fake CUDA tensors.
What a GPU does otherwise is set right here, by name: see `_as_on_cuda`.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sltrain_dist.config import TrainConfig
from sltrain_dist.ops import precision
from sltrain_dist.optim import blockwise
from sltrain_dist.optim.table import OptimizerFactory
from sltrain_dist.parallel import mesh as meshes
from sltrain_dist.parallel.engine import build_engine
from sltrain_dist.parallel.fake import fsdp_param
from sltrain_dist.parallel.mesh import Mesh
from sltrain_dist.parallel.tensor import tensor_parallel
from sltrain_dist.params import ParameterSpec
from sltrain_dist.params.initial import FROZEN
from sltrain_dist.tools.plan_live import Live
from sltrain_dist.tools.plan_zero import ZeroRank
from sltrain_dist.train.build import make_model
from sltrain_dist.train.linear_paths import LinearPaths
from sltrain_dist.train.update import update

_MICRO_BATCHES = 2  # enough to see gradients of one kept while the next ones are made


@dataclass(frozen=True)
class Measured:
    """What the fake run saw on the first rank: bytes by kind (plan_live.KINDS) at the peak, and over time.

    history: total bytes after every change.
    """

    peak: dict[str, int]
    history: list[int]


def measure(config: TrainConfig, world_size: int, device: str, paths: LinearPaths) -> Measured:
    """Run one update of ``config`` on ``world_size`` imagined ranks.

    Args:
        device: "cpu" or "cuda". paths: of the linears (train.linear_paths.decide).

    Raises:
        UserError: axes that do not fit the ranks, or a combination that the engine refuses.
    """
    engine = config.engine
    mesh = meshes.imagine(world_size, engine.tensor_parallel, engine.replicate)
    try:
        with _quick(), _as_on_cuda(device), FakeTensorMode(), Live(device) as live:
            _one_update(config, mesh, paths, live)
    finally:
        meshes.close()
    return Measured(live.peak(), [sum(now.values()) for now in live.history()])


def _one_update(config: TrainConfig, mesh: Mesh, paths: LinearPaths, live: Live) -> None:
    """What pretrain does from the engine on; what holds memory lives no longer than this call."""
    config = replace(config, compile="none")
    tp = tensor_parallel(mesh, config.engine)

    def factory(*, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        model = make_model(config, "sdpa", "torch", paths, tp, device=device, dtype=dtype)
        for module in model.modules():
            specs: dict[str, ParameterSpec] = getattr(module, "specs", {})
            for name, spec in specs.items():
                specs[name] = _blank(spec)
        return model

    engine: Any
    if config.engine.engine == "zero":
        engine = ZeroRank(factory, mesh, config, live)
        _name_weights(engine, live, engine.stage == 3)
    else:
        optimizer = OptimizerFactory(config.optimizer)
        engine = build_engine(factory, mesh, config.engine, optimizer, config.method.seed)
        _name_weights(engine, live)
        _name_state(engine, live)
    _follow(engine.module, live)
    run: Any = SimpleNamespace(config=config, mesh=mesh, engine=engine)
    shape = (config.engine.batch_size, config.data.sequence_length)
    with live.during("activations"):
        batch = [
            {name: torch.zeros(shape, dtype=torch.int64) for name in ("tokens", "labels")}
            for _ in range(min(config.engine.gradient_accumulation, _MICRO_BATCHES))
        ]
    with live.during("workspaces"):
        update(run, batch, config.optimizer.lr)


class _Blank(ParameterSpec):
    """A parameter that gets memory, and no values."""

    def fill(self, out: Tensor, seed: int, name: str, start: int) -> None:
        """Leave ``out`` as it is."""


def _blank(spec: ParameterSpec) -> ParameterSpec:
    # So that no ranks' supports are compared, and no masks chosen.
    kind = "dense" if spec.kind in FROZEN else spec.kind
    return _Blank(spec.shape, kind, spec.logical_numel, spec.initial, spec.cut)


def _name_weights(engine: Any, live: Live, gathered: bool = False) -> None:
    for parameter in engine.module.parameters():
        if not parameter.requires_grad:
            live.label([parameter], "offsets")
        elif not gathered:
            live.label([parameter], "weights")


def _follow(model: Any, live: Live) -> None:
    """Have ``live`` tell activations from the loss, recomputation in backward included."""
    live.follow(model, "activations")
    for block in model.blocks:
        live.follow(block, "activations")
    live.follow(model.lm_head, "loss")


def _name_state(engine: Any, live: Live) -> None:
    """Tell ``live`` what FSDP2's optimizer state and gradients are."""
    for state in engine.optimizer.state.values():
        live.label((part for part in state.values() if isinstance(part, Tensor)), "optimizer")
    accumulate = engine.accumulate

    def accumulated(loss: Tensor, *, last: bool) -> None:
        accumulate(loss, last=last)
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        live.label([*gradients, *getattr(engine, "_sums", {}).values()], "gradients")

    engine.accumulate = accumulated


@contextlib.contextmanager
def _quick() -> Iterator[None]:
    """Let FSDP2 cut off this rank's chunk of a parameter alone, and pad it once: it tells by addresses, which fake
    tensors have not; and keep fake tensors out of what outlives the run.
    """

    def chunks(tensor: Tensor, count: int, dim: int) -> list[Tensor]:
        own = tensor.narrow(dim, 0, -(-tensor.shape[dim] // count))
        return [own] * count  # of the first rank, which is all that is read

    reset = fsdp_param.FSDPParam.reset_sharded_param
    padded: set[int] = set()

    def reset_once(self: fsdp_param.FSDPParam) -> None:
        if id(self) not in padded:
            reset(self)
            if not self._sharded_param_data.is_meta:
                padded.add(id(self))

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(fsdp_param, "_chunk_with_empty", chunks))
        stack.enter_context(
            mock.patch.object(fsdp_param.FSDPParam, "reset_sharded_param", reset_once)
        )
        stack.enter_context(mock.patch.dict(blockwise._MAPS, clear=True))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield


@contextlib.contextmanager
def _as_on_cuda(device: str) -> Iterator[None]:
    """For ``device`` "cuda": bfloat16 is multiplied as it is."""
    if device != "cuda":
        yield
        return
    with mock.patch.object(precision, "native_bfloat16", return_value=True):
        yield
