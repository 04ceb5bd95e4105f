"""Every optimizer this version has, in ONE table, and the factory engines build them through.

Engines hand over plain local tensors (shards, or ZeRO's flat partitions) and get a live torch optimizer
whose state tensors exist from the start, so that a checkpoint can be read or written before any update.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sltrain_dist.config import OptimizerConfig
from sltrain_dist.optim.adafactor import Adafactor
from sltrain_dist.utils.errors import UserError


@dataclass(frozen=True)
class Row:
    """One optimizer.

    kind: exact class of the live optimizer. arguments: its keyword arguments from the flags.
    states: names of its state tensors for a parameter with so many dimensions.
    whole_matrices: it looks at rows and columns, so it cannot work on shards.
    counts_groups: its step counter stands in the parameter groups, not in the states.
    """

    kind: type[Optimizer]
    arguments: Callable[[OptimizerConfig], dict[str, Any]]
    states: Callable[[OptimizerConfig, int], tuple[str, ...]]
    whole_matrices: bool = False
    counts_groups: bool = False


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


OPTIMIZERS: dict[str, Row] = {
    "adamw": Row(torch.optim.AdamW, _adam, _adam_states),
    "adam": Row(torch.optim.Adam, _adam, _adam_states),
    "sgd": Row(torch.optim.SGD, _sgd, _sgd_states),
    "adafactor": Row(Adafactor, _adafactor, _adafactor_states, whole_matrices=True),
}
# NVIDIA apex's one-launch-for-all-tensors Adam, where it is installed; imported when it is asked for.
_APEX = {"apex_adamw": True, "apex_adam": False}  # name -> decoupled weight decay
# Named by the reference's usage, planned, and not here yet.
_LATER = ("adam8bit", "adam8bit_per_layer", "adamw8bit")


def optimizer_row(name: str) -> Row:
    """The table's row of that name.

    Raises:
        UserError: an unknown name, or one that this version does not have yet.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if name in _APEX:
        return _apex_row(name)
    if name in _LATER:
        raise UserError(f"--optimizer {name}: not in this version; use --optimizer adamw")
    raise UserError(
        f"--optimizer {name}: unknown; optimizers are {', '.join((*OPTIMIZERS, *_APEX))}"
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

    return Row(FusedAdam, arguments, _adam_states, counts_groups=True)


class OptimizerFactory:
    """Builds the configured optimizer and knows its state; see `parallel.engine.OptimizerFactory`."""

    def __init__(self, config: OptimizerConfig) -> None:
        """Raises UserError where the name or a number in ``config`` is not usable."""
        self.row = optimizer_row(config.name)
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

    def build(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """The live optimizer in one parameter group; ``parameters`` may be empty on a rank."""
        arguments = self.row.arguments(self.config)
        return self.row.kind([{"params": list(parameters)}], **arguments)

    def begin(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], step: int) -> None:
        """Create missing state tensors as zeros and set every step counter to ``step``.

        A zero state with step 0 is what each of these optimizers would create in its first update.
        """
        for parameter in parameters:
            state = optimizer.state[parameter]
            for name in self.row.states(self.config, parameter.dim()):
                if state.get(name) is None:
                    state[name] = torch.zeros(
                        _state_shape(name, parameter),
                        dtype=parameter.dtype,
                        device=parameter.device,
                    )
            if self.row.kind is not torch.optim.SGD and not self.row.counts_groups:
                # Fused kernels read the counter on the parameter's device.
                state["step"] = torch.tensor(float(step), device=parameter.device)
        if self.row.counts_groups:
            for group in optimizer.param_groups:
                group["step"] = step

    def tensors(self, optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state tensors of ``parameter`` by name, without step counters."""
        state = optimizer.state[parameter]
        return {name: state[name] for name in self.state_names(parameter.dim())}

    def state_names(self, parameter_dim: int) -> tuple[str, ...]:
        """Names that `tensors` has for a parameter with so many dimensions."""
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
    expected = optimizer_row(config.name).kind
    if type(optimizer) is not expected:
        raise RuntimeError(
            f"--optimizer {config.name} is {expected}, but {type(optimizer)} is live"
        )
    for group in optimizer.param_groups:
        if group["weight_decay"] != config.weight_decay:
            raise RuntimeError(
                f"--weight_decay {config.weight_decay}, but a live group has {group['weight_decay']}"
            )
