"""One update of the weights.

The loss of an update is the sum of token losses over all valid tokens of all ranks and
micro-batches, divided by their number: it does not depend on how the batch was cut.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sltrain_dist.config import MethodConfig
from sltrain_dist.data.samples import Batch
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.parallel.mesh import sum_over_ranks
from sltrain_dist.train.timing import Stopwatch


def update(
    run: Any,
    micro_batches: list[Batch],
    lr: float,
    *,
    clock: Stopwatch | None = None,
    refuses: Callable[[float], bool] | None = None,
) -> tuple[float, int, float]:
    """One update of the weights.

    Args:
        run: a `train.build.Run`; its engine, mesh and ``config.loss_average`` are used.
        micro_batches: this rank's share of the global batch.
        clock: told of the phases forward, backward and optimizer.
        refuses: asked with the update's mean loss before its last backward pass; where it says yes the
            weights are left as they are and the norm returned is not finite.

    Returns:
        (mean loss in nats per token, valid tokens over all ranks, global gradient norm).
    """
    engine, mesh = run.engine, run.mesh
    begin = clock.begin if clock is not None else lambda phase: None
    begin("forward")
    counts = torch.stack([(batch["labels"] >= 0).sum() for batch in micro_batches])
    valid = sum_over_ranks(mesh, counts.sum())
    if run.config.loss_average == "micro_batches":  # the reference's mean of means
        weights = (counts.clamp(min=1) * len(micro_batches) * mesh.dp_size).to(mesh.device)
    else:
        weights = valid.clamp(min=1).expand(len(micro_batches))
    engine.begin_update(lr)
    total: Tensor = torch.zeros((), device=mesh.device)
    for number, (tokens, labels) in enumerate(on_device(micro_batches, mesh.device)):
        begin("forward")
        last = number == len(micro_batches) - 1
        share = engine.module(tokens, labels) / weights[number]
        total += share.detach()
        if last and refuses is not None and refuses(float(sum_over_ranks(mesh, total))):
            # A gradient that is not finite is what every engine leaves the weights alone for.
            share = share * math.nan
        begin("backward")
        engine.accumulate(share, last=last)
    begin("optimizer")
    norm = engine.step(lr)
    return float(sum_over_ranks(mesh, total)), int(valid), norm


def choose_masks(engine: Engine, method: MethodConfig, number: int) -> None:
    """After update ``number``: under --method slope choose its second masks, where their time has come; collective.

    An update that left the weights alone counts too: then the masks come out as they were.
    """
    every = method.mask_change_freq
    if method.method == "slope" and every and number % every == 0:
        engine.choose_masks()


def on_device(micro_batches: list[Batch], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """(tokens, labels) of every micro-batch on the device, moved in two copies that block nobody."""
    moved = []
    for key in ("tokens", "labels"):
        together = torch.stack([batch[key] for batch in micro_batches])
        if device.type == "cuda":
            together = together.pin_memory()
        moved.append(together.to(device, non_blocking=True).unbind())
    return list(zip(*moved, strict=True))
