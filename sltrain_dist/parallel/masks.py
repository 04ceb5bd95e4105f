"""The second mask of --method slope (ops.pruned), chosen again from the weights as they are now, under any engine.

The mask groups rows, and rows are what FSDP2 and ZeRO-3 cut: a rank has the whole values and offsets of one layer after
the other (of its tensor-parallel part, whose groups are whole: check_tensor_parallel), and chooses for the rows that it
holds a part of. All ranks compute from the same numbers, in the format the model computes with, so replicas agree.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from sltrain_dist.ops.pattern import prune_rows
from sltrain_dist.params import ParameterSpec
from sltrain_dist.params.slope import SecondPruning


class Holder(Protocol):
    """What an engine tells of its parameters, by name."""

    def whole(self, name: str) -> Tensor:
        """What this tensor-parallel rank holds of a parameter, over all data-parallel ranks; collective."""
        ...

    def held_rows(self, name: str) -> tuple[int, int]:
        """Bounds of the rows of `whole` that this rank holds elements of."""
        ...

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Write what this rank holds of a parameter; ``rows``: from row ``start`` on, at least `held_rows`."""
        ...


def masks(specs: Mapping[str, ParameterSpec]) -> list[str]:
    """The names of second masks among parameters."""
    return [name for name, spec in specs.items() if spec.kind == "mask"]


@torch.no_grad()
def choose_masks(specs: Mapping[str, ParameterSpec], holder: Holder) -> None:
    """Choose every mask anew; collective, one layer in memory at a time."""
    for name in masks(specs):
        first = specs[name].initial
        assert isinstance(first, SecondPruning)
        layer = name.removesuffix("backward")
        values, offsets = (holder.whole(layer + part) for part in ("values", "offsets"))
        start, stop = holder.held_rows(name)
        size = first.pattern.group
        start, stop = start // size * size, -(-stop // size) * size  # whole groups
        if start < stop:
            chosen = prune_rows(values[start:stop], offsets[start:stop], first.pattern)
            holder.write_rows(name, start, chosen)
        del values, offsets
