"""Where a training step's time goes: clocks around the linears, the head with the loss, attention, the optimizer.

The clocks are hooks, forward and backward, on CUDA events: extra steps that are not part of any other figure.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from measure import wait
from reference import ReferenceLinear
from torch import Tensor, nn

from sltrain_dist.model.llama import Attention, Head
from sltrain_dist.params import ParameterizedLinear

PARTS = ("linears", "head and loss", "attention", "optimizer", "rest")


class _Clocks:
    """Clocks around the parts of a model, forward and backward; on CUDA events, so that nothing waits."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self.device = device
        self.open: dict[str, list[Any]] = defaultdict(list)
        self.closed: list[tuple[str, Any, Any]] = []
        for module in list(model.modules()):
            if isinstance(module, ParameterizedLinear | ReferenceLinear):
                self.watch(module, "linears")
            elif isinstance(module, Head):
                self.watch(module, "head and loss")
            elif isinstance(module, Attention):
                module.attention = _Function(module.attention)
                self.watch(module.attention, "attention")

    def now(self) -> Any:
        """A moment."""
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, part: str) -> None:
        """A part begins."""
        self.open[part].append(self.now())

    def stop(self, part: str) -> None:
        """A part ends."""
        if self.open[part]:
            self.closed.append((part, self.open[part].pop(), self.now()))

    def watch(self, module: nn.Module, part: str) -> None:
        """Hook a module."""
        module.register_forward_pre_hook(lambda *_: self.start(part))
        module.register_forward_hook(lambda *_: self.stop(part))
        module.register_full_backward_pre_hook(lambda *_: self.start(part))
        module.register_full_backward_hook(lambda *_: self.stop(part))

    def collect(self) -> dict[str, float]:
        """Seconds per part since the last call."""
        wait(self.device)
        found: dict[str, float] = defaultdict(float)
        for part, begin, end in self.closed:
            cuda = self.device == "cuda"
            found[part] += begin.elapsed_time(end) / 1e3 if cuda else end - begin
        self.closed.clear()
        self.open.clear()
        return found


class _Function(nn.Module):
    """A function as a module, so that it can be hooked."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def shares(
    model: nn.Module,
    backward: Callable[[], object],
    update: Callable[[], object],
    device: str,
    turns: int,
) -> dict[str, float]:
    """Share of a step's time per part, medians of ``turns``, of a warm model; it keeps the clocks.

    Args:
        backward: forward and backward of a batch. update: the optimizer's part.
    """
    clocks, runs = _Clocks(model, device), []
    for _ in range(turns):
        clocks.start("step")
        backward()
        clocks.start("optimizer")
        update()
        clocks.stop("optimizer")
        clocks.stop("step")
        runs.append(clocks.collect())
    found = {part: median(run[part] / run["step"] for run in runs) for part in PARTS[:-1]}
    return {**found, "rest": 1 - sum(found.values())}
