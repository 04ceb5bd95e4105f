"""Every optimizer this version has, in ONE table, and the factory engines build them through.

Engines hand over plain local tensors (shards, or ZeRO's flat partitions) and get a live torch optimizer
whose state tensors exist from the start, so that a checkpoint can be read or written before any update.
"""

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sltrain_dist.config import OptimizerConfig
from sltrain_dist.optim.adafactor import Adafactor
from sltrain_dist.optim.blockwise import MOMENTS, SCALES, BlockwiseAdam
from sltrain_dist.parallel.engine import Group, Trained
from sltrain_dist.utils.errors import UserError

Counter = Literal["tensor", "int", "group", "none"]
_SMALL = 4096  # elements of a parameter, all ranks together, below which moments stay float32
_VOCABULARY = ("model.embed_tokens.", "lm_head.")
_VECTORS = ("norm.weight", ".bias")  # one per feature: few, and each matters


@dataclass(frozen=True)
class Row:
    """One optimizer.

    kind: exact class of the live optimizer. arguments: its keyword arguments from the flags.
    states: names of its state tensors for a parameter with so many dimensions.
    whole_matrices: it looks at rows and columns, so it cannot work on shards.
    counter: where its number of updates stands: in each state as a tensor or an int, or in the groups.
    bits: of its moments, where a parameter is large enough.
    """

    kind: type[Optimizer]
    arguments: Callable[[OptimizerConfig], dict[str, Any]]
    states: Callable[[OptimizerConfig, int], tuple[str, ...]]
    whole_matrices: bool = False
    counter: Counter = "tensor"
    bits: int = 32


def _adam(config: OptimizerConfig) -> dict[str, Any]:
    # Fused: one pass over memory, also on CPU, where the plain loop takes several times as long.
    return {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "fused": True,
    }


def _sgd(config: OptimizerConfig) -> dict[str, Any]:
    return {
        "lr": config.lr,
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
        "fused": True,
    }


def _adafactor(config: OptimizerConfig) -> dict[str, Any]:
    return {"lr": config.lr, "beta1": config.momentum, "weight_decay": config.weight_decay}


def _adam_states(config: OptimizerConfig, dim: int) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq")


def _sgd_states(config: OptimizerConfig, dim: int) -> tuple[str, ...]:
    return ("momentum_buffer",) if config.momentum else ()


def _adafactor_states(config: OptimizerConfig, dim: int) -> tuple[str, ...]:
    second = ("row_mean", "column_mean") if dim >= 2 else ("mean",)
    return (*second, "exp_avg") if config.momentum else second


def _blockwise(config: OptimizerConfig) -> dict[str, Any]:
    arguments = _adam(config) | {
        "stochastic": config.rounding == "stochastic",
        "seed": config.seed,
    }
    del arguments["fused"]
    return arguments


OPTIMIZERS: dict[str, Row] = {
    "adamw": Row(torch.optim.AdamW, _adam, _adam_states),
    "adam": Row(torch.optim.Adam, _adam, _adam_states),
    "sgd": Row(torch.optim.SGD, _sgd, _sgd_states, counter="none"),
    "adafactor": Row(Adafactor, _adafactor, _adafactor_states, whole_matrices=True),
    "adamw8bit": Row(BlockwiseAdam, _blockwise, _adam_states, counter="int", bits=8),
    "adam8bit": Row(BlockwiseAdam, _blockwise, _adam_states, counter="int", bits=8),
}
# NVIDIA apex's one-launch-for-all-tensors Adam, where it is installed; imported when it is asked for.
_APEX = {"apex_adamw": True, "apex_adam": False}  # name -> decoupled weight decay


def optimizer_row(config: OptimizerConfig) -> Row:
    """The row of the optimizer that is asked for, made ready.

    Raises:
        UserError: an unknown name, a package that is missing, or something it cannot do.
    """
    name = config.name
    if name in _APEX:
        row = _apex_row(name)
    elif name in OPTIMIZERS:
        row = OPTIMIZERS[name]
    else:
        raise UserError(
            f"--optimizer {name}: unknown; optimizers are {', '.join((*OPTIMIZERS, *_APEX))}"
        )
    if config.rounding == "stochastic":
        if name in ("adam", "adamw"):
            row = Row(BlockwiseAdam, _blockwise, _adam_states, counter="int")
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


def _apex_row(name: str) -> Row:
    plain = name.removeprefix("apex_")
    if not torch.cuda.is_available():
        raise UserError(f"--optimizer {name}: needs a CUDA GPU; use --optimizer {plain}")
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise UserError(
            f"--optimizer {name}: apex does not import ({error}); build "
            f"https://github.com/NVIDIA/apex with its CUDA extensions, or use --optimizer {plain}"
        ) from None

    def arguments(config: OptimizerConfig) -> dict[str, Any]:
        ours = _adam(config) | {"adam_w_mode": _APEX[name]}
        del ours["fused"]
        return ours

    return Row(FusedAdam, arguments, _adam_states, counter="group")


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
                " use one process with --engine fsdp, or ZeRO stage 0, or --optimizer adamw"
            )

    def bits(self, name: str, numel: int) -> int:
        """8 or 32: norms, biases and small tensors keep 32-bit moments, embedding and head by --embedding_state_bits."""
        if self.row.bits == 32 or numel < _SMALL or name.endswith(_VECTORS):
            return 32
        return self.config.embedding_state_bits if name.startswith(_VOCABULARY) else 8

    def build(self, trained: Sequence[Trained]) -> Optimizer:
        """The live optimizer, its parameters in one group for each number of bits; there may be none on a rank."""
        arguments = self.row.arguments(self.config)
        groups: dict[int, list[nn.Parameter]] = {bits: [] for bits in {32, self.row.bits}}
        for one in trained:
            groups[self.bits(one.name, one.numel)].append(one.parameter)
        filled = [
            {"params": these, "bits": bits} for bits, these in sorted(groups.items()) if these
        ]
        return self.row.kind(filled or [{"params": [], "bits": 32}], **arguments)

    def begin(
        self, optimizer: Optimizer, updated: Iterable[tuple[nn.Parameter, Group]], step: int
    ) -> None:
        """Create missing state tensors as zeros and set every step counter to ``step``.

        A zero state with step 0 is what each of these optimizers would create in its first update.
        """
        for parameter, group in updated:
            state = optimizer.state[parameter]
            if isinstance(optimizer, BlockwiseAdam):
                optimizer.create_state(parameter, group["bits"])
            for name in self.row.states(self.config, parameter.dim()):
                if state.get(name) is None:
                    state[name] = torch.zeros(
                        _state_shape(name, parameter),
                        dtype=parameter.dtype,
                        device=parameter.device,
                    )
            if self.row.counter == "tensor":
                # Fused kernels read the counter on the parameter's device.
                state["step"] = torch.tensor(float(step), device=parameter.device)
            elif self.row.counter == "int":
                state["step"] = step
        if self.row.counter == "group":
            for group in optimizer.param_groups:
                group["step"] = step

    def tensors(self, optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state tensors of ``parameter`` by name, without step counters."""
        state = optimizer.state[parameter]
        return {name: state[name] for name in self.state_names(parameter.dim())}

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

    def state_names(self, parameter_dim: int) -> tuple[str, ...]:
        """Names of 32-bit state tensors of a parameter with so many dimensions."""
        return self.row.states(self.config, parameter_dim)


def _state_shape(name: str, parameter: Tensor) -> tuple[int, ...]:
    """Adafactor's means drop a dimension; every other state has the parameter's shape."""
    shape = tuple(parameter.shape)
    if name == "row_mean":
        return shape[:-1]
    if name == "column_mean":
        return (*shape[:-2], shape[-1])
    return shape


def describe(optimizer: Optimizer) -> dict[str, Any]:
    """What the LIVE optimizer is, for the summary: class, settings and local elements of every group."""
    groups = []
    for group in optimizer.param_groups:
        # ZeRO-3 empties the groups between updates; the state still knows the tensors.
        parameters = group["params"] or list(optimizer.state)
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
