"""Every optimizer this version has, in ONE table, and the factory engines build them through.

Engines hand over plain local tensors (shards, or ZeRO's flat partitions) and get a live torch optimizer
whose state tensors exist from the start, so that a checkpoint can be read or written before any update.
"""

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sltrain_dist.config import OptimizerConfig
from sltrain_dist.optim.adafactor import Adafactor
from sltrain_dist.optim.blockwise import MOMENTS, SCALES, BlockwiseAdam
from sltrain_dist.optim.muon import MUON
from sltrain_dist.optim.packages import NAMES, package_row
from sltrain_dist.optim.row import VOCABULARY, Row, Shape, adam_arguments, adam_states, fill_missing
from sltrain_dist.parallel.engine import Group, Trained
from sltrain_dist.utils.errors import UserError

_SMALL = 4096  # elements of a parameter, all ranks together, below which moments stay float32
_VECTORS = ("norm.weight", ".bias")  # one per feature: few, and each matters


def _adam(config: OptimizerConfig) -> dict[str, Any]:
    # Fused: one pass over memory, also on CPU, where the plain loop takes several times as long.
    return adam_arguments(config) | {"fused": True}


def _sgd(config: OptimizerConfig) -> dict[str, Any]:
    return {
        "lr": config.lr,
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
        "fused": True,
    }


def _adafactor(config: OptimizerConfig) -> dict[str, Any]:
    return {"lr": config.lr, "beta1": config.momentum, "weight_decay": config.weight_decay}


def _sgd_states(config: OptimizerConfig, shape: Shape, matrix: bool) -> dict[str, Shape]:
    return {"momentum_buffer": shape} if config.momentum else {}


def _adafactor_states(config: OptimizerConfig, shape: Shape, matrix: bool) -> dict[str, Shape]:
    means = {"row_mean": shape[:-1], "column_mean": (*shape[:-2], *shape[-1:])}
    second = means if len(shape) >= 2 else {"mean": shape}
    return second | ({"exp_avg": shape} if config.momentum else {})


def _blockwise(config: OptimizerConfig) -> dict[str, Any]:
    stochastic = config.rounding == "stochastic"
    return adam_arguments(config) | {"stochastic": stochastic, "seed": config.seed}


OPTIMIZERS: dict[str, Row] = {
    "adamw": Row(torch.optim.AdamW, _adam, adam_states),
    "adam": Row(torch.optim.Adam, _adam, adam_states),
    "sgd": Row(torch.optim.SGD, _sgd, _sgd_states, counter="none"),
    "adafactor": Row(Adafactor, _adafactor, _adafactor_states, whole_matrices=True, counter="int"),
    "adamw8bit": Row(BlockwiseAdam, _blockwise, adam_states, counter="int", bits=8),
    "adam8bit": Row(BlockwiseAdam, _blockwise, adam_states, counter="int", bits=8),
    "muon": MUON,
}


def optimizer_row(config: OptimizerConfig) -> Row:
    """The row of the optimizer that is asked for, made ready.

    Raises:
        UserError: an unknown name, a package that is missing, or something it cannot do.
    """
    name = config.name
    if name in NAMES:
        row = package_row(name)
    elif name in OPTIMIZERS:
        row = OPTIMIZERS[name]
    else:
        raise UserError(
            f"--optimizer {name}: unknown; optimizers are {', '.join((*OPTIMIZERS, *NAMES))}"
        )
    if config.rounding == "stochastic":
        if name in ("adam", "adamw"):
            row = Row(BlockwiseAdam, _blockwise, adam_states, counter="int")
        elif row.kind is not BlockwiseAdam:
            raise UserError(
                f"--master_weights stochastic: --optimizer {name} rounds to nearest; take adamw, adam, adamw8bit or adam8bit"
            )
    if row.kind is BlockwiseAdam:
        _check_blockwise(config, row)
    return row


def _check_blockwise(config: OptimizerConfig, row: Row) -> None:
    if config.weight_decay and config.name.startswith("adam") and "adamw" not in config.name:
        raise UserError(
            f"--weight_decay {config.weight_decay:g}: --optimizer {config.name} has none but the decoupled one; "
            f"use --optimizer {config.name.replace('adam', 'adamw')}"
        )
    if row.bits == 8 and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"--optimizer {config.name}: bitsandbytes is not installed; pip install bitsandbytes, or use --optimizer adamw"
        )


class OptimizerFactory:
    """Builds the configured optimizer and knows its state; see `parallel.engine.OptimizerFactory`."""

    def __init__(self, config: OptimizerConfig) -> None:
        """Raises UserError where the name or a number in ``config`` is not usable."""
        self.row = optimizer_row(config)
        self.config = config
        if not config.lr > 0:
            raise UserError(f"--lr {config.lr}: must be above 0")
        if config.weight_decay < 0 or config.grad_clipping < 0:
            raise UserError(
                f"--weight_decay {config.weight_decay}, --grad_clipping {config.grad_clipping}: must be at least 0"
            )
        if not 0 <= config.momentum < 1:
            raise UserError(f"--beta1 {config.momentum}: must lie in 0 <= beta1 < 1")

    def check(self, description: str, sharded: bool) -> None:
        """Refuse an optimizer that needs whole matrices where parameters are cut.

        Raises:
            UserError: naming the engine setting ``description`` and the mend.
        """
        if sharded and self.row.whole_matrices:
            raise UserError(
                f"--optimizer {self.config.name}: needs whole matrices, but {description} cuts them;"
                " use one process, or --replicate for as many copies as there are ranks, or ZeRO stage 0, or --optimizer adamw"
            )

    def bits(self, name: str, numel: int) -> int:
        """8 or 32: norms, biases and small tensors keep 32-bit moments, embedding and head by --embedding_state_bits."""
        if self.row.bits == 32 or numel < _SMALL or name.endswith(_VECTORS):
            return 32
        return self.config.embedding_state_bits if name.startswith(VOCABULARY) else 8

    def build(self, trained: Sequence[Trained]) -> Optimizer:
        """The live optimizer, its parameters in groups by bits of their moments and by treatment; there may be none on a rank."""
        groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for one in trained:
            matrix = self.row.is_matrix(self.config, one.name, tuple(one.parameter.shape))
            key = (self.bits(one.name, one.numel), matrix)
            groups.setdefault(key, []).append(one.parameter)
        settings = self.row.matrices(self.config) if self.row.matrices is not None else {}
        filled = [
            {"params": these, "bits": bits, **(settings if matrix else {})}
            for (bits, matrix), these in sorted(groups.items(), key=lambda item: item[0])
        ]
        arguments = self.row.arguments(self.config)
        return self.row.kind(filled or [{"params": [], "bits": 32}], **arguments)

    def begin(
        self, optimizer: Optimizer, updated: Iterable[tuple[nn.Parameter, Group]], step: int
    ) -> None:
        """Create missing state tensors as zeros and set every step counter to ``step``.

        A zero state with step 0 is what each of these optimizers would create in its first update.
        """
        for number, (parameter, group) in enumerate(updated, 1):
            state, matrix = optimizer.state[parameter], group.get("matrix", False)
            if isinstance(optimizer, BlockwiseAdam):
                optimizer.create_state(parameter, group["bits"])
            shapes = self.row.states(self.config, tuple(parameter.shape), matrix)
            fill_missing(state, shapes, parameter.detach())
            if self.row.counter == "tensor":
                # Fused kernels read the counter on the parameter's device.
                state["step"] = torch.tensor(float(step), device=parameter.device)
            elif self.row.counter == "int":
                state["step"] = step
            if matrix and self.row.prepare is not None:
                self.row.prepare(state, group, number, step)
        if self.row.counter == "group":
            for group in optimizer.param_groups:
                group["step"] = step

    def tensors(self, optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state tensors of ``parameter`` by name, without step counters."""
        state = optimizer.state[parameter]
        return {
            name: value if value.dim() else value.view(1)  # APOLLO makes its norm a scalar
            for name, value in state.items()
            if isinstance(value, Tensor) and name != "step"
        }

    def moments(self, optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Codes and scales of a parameter with 8-bit moments, flat; empty where the parameter is."""
        if not parameter.numel():
            codes, scales = (
                parameter.new_zeros(0, dtype=torch.uint8),
                parameter.new_zeros(0).float(),
            )
            return dict.fromkeys(MOMENTS, codes) | dict.fromkeys(SCALES.values(), scales)
        state = optimizer.state[parameter]
        return {name: state[name].view(-1) for name in (*MOMENTS, *SCALES.values())}

    def state_names(self, name: str, shape: Shape) -> tuple[str, ...]:
        """Names of 32-bit state tensors of the parameter ``name``."""
        matrix = self.row.is_matrix(self.config, name, shape)
        return tuple(self.row.states(self.config, shape, matrix))


def describe(optimizer: Optimizer) -> dict[str, Any]:
    """What the LIVE optimizer is, for the summary: class, settings and local elements of every group."""
    groups = []
    for group in optimizer.param_groups:
        # ZeRO-3 empties the groups between updates; the state still knows the tensors.
        parameters = group["params"] or [
            parameter
            for parameter, state in optimizer.state.items()
            if (8 if state.keys() & set(SCALES.values()) else 32) == group.get("bits", 32)
        ]
        settings = {
            key: value for key, value in group.items() if isinstance(value, (int, float, tuple))
        }
        groups.append({"elements": sum(p.numel() for p in parameters), **settings})
    return {
        "class": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
        "groups": groups,
    }


def assert_live(optimizer: Optimizer, config: OptimizerConfig) -> None:
    """Check that what will update the weights is what --optimizer asked for.

    Raises:
        RuntimeError: another class, or a group with another weight decay; an engine replaced it.
    """
    expected = optimizer_row(config).kind
    if type(optimizer) is not expected:
        raise RuntimeError(
            f"--optimizer {config.name} is {expected}, but {type(optimizer)} is live"
        )
    for group in optimizer.param_groups:
        if group["weight_decay"] != config.weight_decay:
            raise RuntimeError(
                f"--weight_decay {config.weight_decay}, but a live group has {group['weight_decay']}"
            )
