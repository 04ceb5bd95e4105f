"""One rank of DeepSpeed ZeRO on fake tensors: the real model, loss and backward, and ZeRO's rule of what is partitioned.

DeepSpeed itself cannot run without its ranks. With P trained elements in groups by bits of their moments, n ranks and a
bucket of b elements (0.19; runtime/zero/stage_1_and_2.py and stage3.py), this engine has at the same moments what ZeRO has:

    always      weights P c in one flat buffer (stage 3: / n, and gathered ones); float32 masters 4 P / n from stage 1 on
                (stage 0: 4 P in bfloat16), moments of those
    backward    every gradient is copied into the bucket and freed; a full bucket is reduced. Stage 2 and 3 keep this
                rank's part, P / n, below them all stay. Gradients larger than the bucket are reduced as they are
    step        one more flat copy of this rank's part
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sltrain_dist.config import TrainConfig
from sltrain_dist.optim.table import OptimizerFactory
from sltrain_dist.parallel.materialise import OneByOne
from sltrain_dist.parallel.mesh import Mesh
from sltrain_dist.parallel.quantised import blocks
from sltrain_dist.params import collect_specs
from sltrain_dist.tools.plan_live import Live
from sltrain_dist.train.memory import zero_config


class ZeroRank:
    """Offers what loop.update asks of an engine.

    module: the model in plain tensors. held: float32 masters. moments: the optimizer's state.
    """

    def __init__(
        self, factory: Callable[..., nn.Module], mesh: Mesh, config: TrainConfig, live: Live
    ) -> None:
        zero: Any = zero_config(config, mesh.dp_size)["zero_optimization"]
        self.stage, self.live = config.engine.stage, live
        self.ranks = mesh.dp_size if self.stage > 0 else 1
        half = config.engine.dtype == "bfloat16"
        dtype = torch.bfloat16 if half else torch.float32
        model = factory(device="meta", dtype=dtype)
        specs = collect_specs(model)
        list(OneByOne(model, torch.device("cpu")).parameters())
        self.module: Any = model
        optimizer = OptimizerFactory(config.optimizer)
        kept = (
            dtype
            if optimizer.row.bits == 32 and not config.engine.master_weights
            else torch.float32
        )
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.held: list[Tensor] = []
        self.moments: list[Tensor] = []
        self.elements = sum(p.numel() for p in trained.values())
        if (half or self.stage > 0) and config.engine.master_weights:
            self.held.append(torch.empty(self._part))
        for name, parameter in trained.items():
            numel = torch.Size(specs[name].shape).numel()
            bits, shape = optimizer.bits(name, numel), tuple(parameter.shape)
            matrix = optimizer.row.is_matrix(config.optimizer, name, shape)
            for state in optimizer.row.states(config.optimizer, shape, matrix).values():
                size = -(-math.prod(state) // self.ranks)
                self.moments += _moment(size, bits, kept)
        self._bucket_size = int(zero["reduce_bucket_size"])
        self._buffers = 2 if zero.get("overlap_comm") else 1
        self._bucket: Tensor | None = None
        self._in_bucket: list[nn.Parameter] = []
        self._filled = 0
        self._part_of_gradient: Tensor | None = None
        live.label(self.held, "weights")
        live.label(self.moments, "optimizer")
        if self.stage == 3:
            self._shard(trained, zero)
        for parameter in trained.values():
            parameter.register_post_accumulate_grad_hook(self._arrived)
        self._touched = min(self._bucket_size, self.elements)

    @property
    def _part(self) -> int:
        return -(-self.elements // self.ranks)

    def begin_update(self, lr: float) -> None:
        """As ZeRO: nothing."""

    def accumulate(self, loss: Tensor, *, last: bool) -> None:
        """Backward, with the bucket there."""
        if self.stage >= 2 or (self.stage == 1 and last):
            with self.live.during("communication"):
                self._bucket = torch.empty(self._touched * self._buffers)
        loss.backward()
        self._reduce()
        self._bucket = None

    def step(self, lr: float) -> float:
        """The flat copy of this rank's gradients, and the end of both."""
        if self.stage > 0:
            with self.live.during("gradients"):
                flat = torch.empty(self._part)
            del flat
        self._part_of_gradient = None
        for parameter in self.module.parameters():
            parameter.grad = None
        return 1.0

    def _arrived(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        self.live.label([gradient], "gradients")
        if self._bucket is None or self.stage < 2:
            return
        if self._filled + gradient.numel() > self._bucket_size:
            self._reduce()
        self._filled += gradient.numel()
        if gradient.numel() <= self._bucket_size:
            parameter.grad = None  # copied into the bucket
        else:
            self._in_bucket.append(parameter)  # type: ignore[arg-type]

    def _reduce(self) -> None:
        """Send what the bucket holds; this rank's part is copied out of it."""
        if self._filled and self._part_of_gradient is None:
            with self.live.during("gradients"):
                self._part_of_gradient = torch.empty(self._part)
        for parameter in self._in_bucket:
            parameter.grad = None
        self._in_bucket.clear()
        self._filled = 0

    def _shard(self, trained: dict[str, nn.Parameter], zero: dict[str, Any]) -> None:
        """Stage 3: the weights here stand for the gathered ones; what is more than may live at once is taken off."""
        width = next(iter(trained.values())).element_size()
        live = min(int(zero.get("stage3_max_live_parameters", 10**9)), self.elements)
        self.live.label(trained.values(), "communication")
        indices = [p for p in self.module.parameters() if not p.requires_grad]
        whole = sum(p.numel() * p.element_size() for p in indices)
        self.live.correct("offsets", whole // self.ranks - whole)
        self.live.correct("communication", (live - self.elements) * width)
        self.held.append(torch.empty(self._part, dtype=torch.bfloat16 if width == 2 else None))
        self.live.label(self.held, "weights")


def _moment(size: int, bits: int, dtype: torch.dtype) -> list[Tensor]:
    """One moment of ``size`` elements, ``dtype`` where it has not 8 bits."""
    if bits == 32:
        return [torch.empty(size, dtype=dtype)]
    return [torch.empty(size, dtype=torch.uint8), torch.empty(blocks(size))]
