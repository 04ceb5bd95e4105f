"""Search the settings of a run that fit a memory, fastest first.

What the user gave is fixed. Of micro-batch, activation checkpointing and tensor parallelism the others are
searched: the closed formula drops what is far too large, the predicted speed gives the order, and the fake run confirms.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from sltrain_dist.config import TrainConfig
from sltrain_dist.tools.plan import Plan, Request, Setting, blank_model, configure, confirm, settle
from sltrain_dist.train.flags import FLAGS, explicit
from sltrain_dist.train.summary import human_bytes
from sltrain_dist.utils.errors import UserError

_BEST = 10
_TRIALS = 30  # fake runs at most
_LARGEST = 64  # micro-batch tried where the total is free
_SLACK = 1.5  # the formula may be so much above what fits
_TENSOR_PARALLEL = (1, 2, 4, 8, 16)
_KINDS = tuple(FLAGS["activation_checkpointing"].choices or ())
_SEARCHED = ("tensor_parallel", "activation_checkpointing", "batch_size")


@dataclass(frozen=True)
class Fits:
    """plans: those that fit, by falling tokens per second. tried: settings looked at, ran: fake runs."""

    plans: list[Plan]
    tried: int
    ran: int

    def describe(self) -> str:
        """A line for each, with the flags to copy."""
        first = self.plans[0].request
        lines = [
            f"fit {human_bytes(first.gpu_memory or 0)}, best first, of {self.tried} settings ({self.ran} run on fake tensors), at "
            f"{first.tflops:g} TFLOP/s and {first.bandwidth:g} GB/s a rank",
            f"{'tokens/s':>12}{'memory':>12}{'formula':>12}  flags",
        ]
        for plan in self.plans:
            total, formula = human_bytes(plan.total), human_bytes(plan.setting.formula["total"])
            speed = f"{plan.setting.tokens_per_second:,.0f}"
            lines.append(f"{speed:>12}{total:>12}{formula:>12}  {flags(plan.setting.config)}")
        return "\n".join(lines)


def flags(config: TrainConfig) -> str:
    """The searched flags of a setting, to copy."""
    engine = config.engine
    values = (engine.tensor_parallel, config.activation_checkpointing, engine.batch_size)
    return " ".join(f"--{name} {value}" for name, value in zip(_SEARCHED, values, strict=True))


def fit(request: Request) -> Fits:
    """The best settings that fit ``request.gpu_memory``.

    Raises:
        UserError: none fits (the line says what the smallest takes), or what pretrain refuses.
    """
    limit = request.gpu_memory
    assert limit is not None
    settings = list(_settings(request))
    near = [each for each in settings if each.formula["total"] <= _SLACK * limit]
    near.sort(key=lambda each: (-each.tokens_per_second, each.formula["total"]))
    plans: list[Plan] = []
    failed: list[TrainConfig] = []
    ran = 0
    for setting in near:
        if len(plans) == _BEST or ran == _TRIALS:
            break
        if any(_larger(setting.config, other) for other in failed):
            continue
        ran += 1
        plan = confirm(request, setting)
        print(
            f"fake run {ran}: {human_bytes(plan.total)} with {flags(setting.config)}",
            file=sys.stderr,
            flush=True,
        )
        if plan.fits:
            plans.append(plan)
        else:
            failed.append(setting.config)
    if not plans:
        small = confirm(request, min(settings, key=lambda each: each.formula["total"]))
        if small.fits:
            return Fits([small], len(settings), ran + 1)
        raise UserError(
            f"--gpu_memory {human_bytes(limit)}: nothing fits; the smallest takes {human_bytes(small.total)}, with"
            f" {flags(small.setting.config)}; add ranks, or take another optimizer or rank"
        )
    return Fits(plans, len(settings), ran)


def _settings(request: Request) -> Iterator[Setting]:
    """Everything that can be searched, by the closed formula."""
    given = explicit(request.arguments)
    problem: UserError | None = None
    found = False
    for tensor_parallel in _choices(given, "tensor_parallel", _TENSOR_PARALLEL):
        changes = [] if "tensor_parallel" in given else ["--tensor_parallel", str(tensor_parallel)]
        if "batch_size" not in given:
            changes += ["--batch_size", "1"]
        try:
            config = configure(request, changes)
        except UserError as error:
            problem = problem or error
            continue
        found, blank = True, blank_model(config)
        for kind in _choices(given, "activation_checkpointing", _KINDS):
            try:
                config = configure(request, [*changes, "--activation_checkpointing", kind])
            except UserError:  # not with the other flags
                continue
            for variant in _micro_batches(config, given, request.gpus // tensor_parallel):
                yield settle(request, variant, blank)
    if not found and problem is not None:
        raise problem


def _micro_batches(config: TrainConfig, given: dict[str, Any], data: int) -> Iterator[TrainConfig]:
    """Micro-batches of a setting on ``data`` data-parallel ranks: they divide the total, or are the total per layer."""
    engine = config.engine
    per_rank = engine.batch_size * engine.gradient_accumulation
    if "batch_size" in given:
        yield config
    elif engine.per_layer and not {"total_batch_size", "gradient_accumulation"} & given.keys():
        for size in (2**n for n in range(_LARGEST.bit_length())):
            cut = replace(engine, batch_size=size)
            yield replace(config, engine=cut, total_batch_size=size * data)
    else:
        for size in (size for size in range(1, per_rank + 1) if per_rank % size == 0):
            cut = replace(engine, batch_size=size, gradient_accumulation=per_rank // size)
            yield replace(config, engine=cut)


def _larger(one: TrainConfig, other: TrainConfig) -> bool:
    """Whether ``one`` is ``other`` with a larger micro-batch; without accumulation it may hold less all the same."""
    same = one.engine.tensor_parallel == other.engine.tensor_parallel and (
        (one.engine.gradient_accumulation == 1) == (other.engine.gradient_accumulation == 1)
    )
    return (
        same
        and one.activation_checkpointing == other.activation_checkpointing
        and one.engine.batch_size >= other.engine.batch_size
    )


def _choices(given: dict[str, Any], name: str, all_: tuple[Any, ...]) -> tuple[Any, ...]:
    return (given[name],) if name in given else all_
