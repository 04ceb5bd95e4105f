"""Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) with the settings of the SLTrain reference.

The reference takes transformers' class with relative_step and scale_parameter off. torch.optim.Adafactor
cannot express that: it always multiplies the step by the parameter's own size, which makes the same --lr
some fifty times smaller and starts B, which is zero, at 1/1000 of the asked rate. Hence these lines.

    R = b R + (1 - b) mean over columns of (G^2 + eps)      b = 1 - t^-0.8
    C = b C + (1 - b) mean over rows of (G^2 + eps)
    U = G / sqrt(R C^T / mean(R));   U = U / max(1, RMS(U) / d);   W = (1 - lr wd) W - lr U
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Adafactor(Optimizer):
    """Adafactor with an external learning rate.

    Second moments are kept as means over rows and columns of the last two dimensions, in the
    parameter's dtype; one-dimensional parameters keep them whole.

    Args:
        parameters: tensors or groups, whole (not shards).
        beta1: first-moment decay; 0 keeps none.
        eps: added to squared gradients. threshold: d, the largest RMS of an update. decay: exponent of b.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float,
        beta1: float = 0.0,
        weight_decay: float = 0.0,
        eps: float = 1e-30,
        threshold: float = 1.0,
        decay: float = -0.8,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "eps": eps,
            "threshold": threshold,
            "decay": decay,
        }
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; state tensors must exist (OptimizerFactory.begin)."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.float(), self.state[parameter], group)

    @staticmethod
    def _update(
        parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        state["step"] += 1
        weight = state["step"] ** group["decay"]
        square = gradient.square().add_(group["eps"])
        if gradient.dim() >= 2:
            rows, columns = state["row_mean"], state["column_mean"]
            rows.lerp_(square.mean(dim=-1).to(rows.dtype), weight)
            columns.lerp_(square.mean(dim=-2).to(columns.dtype), weight)
            row_factor = (rows / rows.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
            update = gradient * row_factor * columns.rsqrt().unsqueeze(-2)
        else:
            mean = state["mean"].lerp_(square.to(state["mean"].dtype), weight)
            update = gradient * mean.rsqrt()
        rms = update.square().mean().sqrt_()
        update.div_((rms / group["threshold"]).clamp_(min=1.0)).mul_(group["lr"])
        if group["beta1"]:
            update = state["exp_avg"].mul_(group["beta1"]).add_(update, alpha=1 - group["beta1"])
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(update.to(parameter.dtype))
