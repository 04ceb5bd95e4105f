"""Muon for the matrices of linears, AdamW for everything else, as one optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sltrain_dist.config import OptimizerConfig
from sltrain_dist.optim.row import Row, Shape, adam_arguments, adam_states

_MOMENTUM = 0.95  # K. Jordan et al., "Muon", 2024


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon on groups whose "matrix" is true, torch's fused AdamW on the others, one state and one list of groups.

    Muon's learning rate is scaled by 0.2 sqrt(max(rows, columns)), by which its update is as large as AdamW's
    (arXiv 2502.16982), so that one learning rate and weight decay serve both.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        blank = nn.Parameter(torch.zeros(1, 1))
        self._inner = {
            True: torch.optim.Muon(
                [blank], lr, weight_decay, _MOMENTUM, adjust_lr_fn="match_rms_adamw"
            ),
            False: torch.optim.AdamW([blank], lr, betas, eps, weight_decay, fused=True),
        }
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "matrix": False})
        for group in self.param_groups:
            for key, value in self._inner[group["matrix"]].defaults.items():
                group.setdefault(key, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update what has a gradient."""
        for matrix, inner in self._inner.items():
            inner.param_groups = [g for g in self.param_groups if g["matrix"] is matrix]
            inner.state = self.state
            inner.step()


def _states(config: OptimizerConfig, shape: Shape, matrix: bool) -> dict[str, Shape]:
    return {"momentum_buffer": shape} if matrix else adam_states(config, shape, matrix)


MUON = Row(
    MuonAdamW,
    adam_arguments,
    _states,
    whole_matrices=True,
    matrices=lambda config: {"matrix": True},
)
