"""What the table of optimizers says of each of them, and what rows share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from sltrain_dist.config import OptimizerConfig
from sltrain_dist.parallel.engine import Group

Counter = Literal["tensor", "int", "group", "none"]
Shape = tuple[int, ...]
States = Callable[[OptimizerConfig, Shape, bool], dict[str, Shape]]


@dataclass(frozen=True)
class Row:
    """One optimizer.

    kind: exact class of the live optimizer. arguments: its keyword arguments from the flags.
    states: names and shapes of its state tensors for a parameter of a shape that is a matrix of a linear, or not.
    whole_matrices: it looks at rows and columns, so it cannot work on shards.
    counter: where its number of updates stands: in each state as a tensor or an int, or in the groups.
    bits: of its moments, where a parameter is large enough.
    matrices: settings of the group of linears' matrices, where it treats them by themselves; with a "rank",
        only matrices that have more rows and columns than that are in it.
    prepare: completes the state of such a matrix, given its group, its number among all that is updated, from 1
        on, and the updates that it has had.
    """

    kind: type[Optimizer]
    arguments: Callable[[OptimizerConfig], dict[str, Any]]
    states: States
    whole_matrices: bool = False
    counter: Counter = "tensor"
    bits: int = 32
    matrices: Callable[[OptimizerConfig], dict[str, Any]] | None = None
    prepare: Callable[[dict[str, Any], Group, int, int], None] | None = None

    def is_matrix(self, config: OptimizerConfig, name: str, shape: Shape) -> bool:
        """Whether the parameter ``name`` is treated as a matrix of a linear: not embedding, head, norms or sparse values."""
        if self.matrices is None or len(shape) != 2 or name.startswith(VOCABULARY):
            return False
        return min(shape) > int(self.matrices(config).get("rank", 0))


VOCABULARY = ("model.embed_tokens.", "lm_head.")


def adam_arguments(config: OptimizerConfig) -> dict[str, Any]:
    """Of every Adam."""
    return {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }


def adam_states(config: OptimizerConfig, shape: Shape, matrix: bool) -> dict[str, Shape]:
    """Two moments of every element."""
    return {"exp_avg": shape, "exp_avg_sq": shape}


def fill_missing(state: dict[str, Any], shapes: dict[str, Shape], like: Tensor) -> None:
    """Create missing state tensors as zeros, in the dtype and on the device of ``like``."""
    for name, shape in shapes.items():
        if state.get(name) is None:
            state[name] = like.new_zeros(shape)
