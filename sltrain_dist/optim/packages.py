"""Optimizers of packages that are not installed with this one, imported when they are asked for."""

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sltrain_dist.config import OptimizerConfig
from sltrain_dist.optim.row import Row, Shape, adam_arguments, adam_states
from sltrain_dist.parallel.engine import Group
from sltrain_dist.utils.errors import UserError

# NVIDIA apex's one-launch-for-all-tensors Adam: name -> decoupled weight decay.
_APEX = {"apex_adamw": True, "apex_adam": False}
# What projects gradients of linears' matrices to --proj_rank: name -> module, default of --proj_scale.
PROJECTED = {"galore_adamw": ("galore_torch", 0.25), "apollo": ("apollo_torch", 1.0)}
NAMES = (*_APEX, *PROJECTED)


def package_row(name: str) -> Row:
    """The row of an optimizer of `NAMES`.

    Raises:
        UserError: its package does not import, or what it needs is not there.
    """
    return _apex_row(name) if name in _APEX else _projected_row(name)


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
    return Row(
        FusedAdam,
        lambda config: adam_arguments(config) | {"adam_w_mode": _APEX[name]},
        adam_states,
        counter="group",
    )


@functools.cache
def _projected_row(name: str) -> Row:
    """GaLore's AdamW (arXiv 2403.03507) or APOLLO (arXiv 2412.05270), by their authors' packages."""
    module = PROJECTED[name][0]
    try:
        package = importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"--optimizer {name}: {module} does not import ({error}); pip install {module.replace('_', '-')}, "
            "or use --optimizer adamw"
        ) from None
    kind = package.GaLoreAdamW if name == "galore_adamw" else package.APOLLOAdamW

    def arguments(config: OptimizerConfig) -> dict[str, Any]:
        return adam_arguments(config) | {"no_deprecation_warning": True}

    def matrices(config: OptimizerConfig) -> dict[str, Any]:
        return {
            "matrix": True,
            "rank": config.proj_rank,
            "update_proj_gap": config.update_proj_gap,
            "scale": PROJECTED[name][1] if config.proj_scale is None else config.proj_scale,
            "proj_type": "std",
            **({"proj": "random", "scale_type": "channel"} if name == "apollo" else {}),
        }

    def states(config: OptimizerConfig, shape: Shape, matrix: bool) -> dict[str, Shape]:
        if not matrix:
            return adam_states(config, shape, matrix)
        (rows, columns), rank = shape, config.proj_rank
        low = (rows, rank) if rows >= columns else (rank, columns)
        across = (rank, columns) if rows >= columns else (rows, rank)
        limited = {"scaled_grad": (1,)} if name == "apollo" else {}
        return {"exp_avg": low, "exp_avg_sq": low, "projection": across, **limited}

    return Row(
        kind,
        arguments,
        states,
        whole_matrices=True,
        counter="int",
        matrices=matrices,
        prepare=functools.partial(_prepare, kept_projectors(package)),
    )


def kept_projectors(package: ModuleType) -> type[Any]:
    """The package's projector, with its matrix in the optimizer's state, where a checkpoint finds it."""
    if package.__name__ == "apollo_torch":
        base: type[Any] = importlib.import_module("apollo_torch.random_projector").GradientProjector
    else:
        base = importlib.import_module("galore_torch.galore_projector").GaLoreProjector

    class Kept(base):
        def __init__(self, state: dict[str, Any], **settings: Any) -> None:
            self._state, self._known = state, False  # a projection has been made
            super().__init__(**settings)

        @property
        def ortho_matrix(self) -> Tensor | None:
            matrix: Tensor = self._state["projection"]
            self._known = self._known or bool(matrix.any())
            return matrix if self._known else None

        @ortho_matrix.setter
        def ortho_matrix(self, matrix: Tensor | None) -> None:
            if matrix is not None:  # that is what the constructor says
                self._state["projection"].copy_(matrix)
                self._known = True

    return Kept


def _prepare(projector: type[Any], state: dict[str, Any], group: Group, number: int, updates: int) -> None:  # fmt: skip
    settings = {"rank": group["rank"], "update_proj_gap": group["update_proj_gap"],
                "scale": group["scale"], "proj_type": group["proj_type"]}  # fmt: skip
    if "proj" in group:  # APOLLO: random, drawn anew with the seed that follows
        module = importlib.import_module("apollo_torch.random_projector")
        seed = number
        for _ in range(-(-updates // group["update_proj_gap"])):
            seed = module.next_seed(seed)
        settings["seed"] = seed
        if updates == 0:  # norm of the update before, which the first is not limited by
            state["scaled_grad"].fill_(torch.inf)
    state["projector"] = projector(state, **settings)
