"""Where DeepSpeed keeps what it updates: three layouts of master weights and optimizer state.

    Whole        stage 0: every rank holds every master
    Flat         stages 1 and 2: all parameters flattened into one vector, each rank updating one piece of it
    Partitioned  stage 3: every parameter cut by itself

All are read as full tensors, one parameter at a time, and written from full tensors. The module is kept
free of deepspeed imports: it works on what DeepSpeed hangs on the parameters.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sltrain_dist.parallel.engine import Group, OptimizerFactory, grouped
from sltrain_dist.parallel.quantised import Fragment
from sltrain_dist.parallel.tensor import all_gather
from sltrain_dist.params import ParameterSpec


def held_weights(parameter: nn.Parameter) -> tuple[Tensor, int]:
    """The model's own weights on this rank and the flat index they start at: all, or ZeRO-3's slice."""
    piece: Tensor | None = getattr(parameter, "ds_tensor", None)
    if piece is None:
        return parameter.data, 0
    return piece, piece.numel() * int(parameter.ds_zero_partition_rank)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Slices:
    """The model's own weights by name: whole on every rank, or ZeRO-3's slices; a `parallel.masks.Holder`."""

    group: ProcessGroup
    specs: dict[str, ParameterSpec]
    parameters: dict[str, nn.Parameter]

    def whole(self, name: str) -> Tensor:
        held, _ = held_weights(self.parameters[name])
        if not hasattr(self.parameters[name], "ds_tensor"):
            return held
        shape = self.specs[name].local_shape
        flat = all_gather(held.contiguous(), self.group).wait().flatten()
        return flat[: math.prod(shape)].view(shape)

    def held_rows(self, name: str) -> tuple[int, int]:
        shape = self.specs[name].local_shape
        if self._is_gathered(name):
            return 0, shape[0]
        held, start = held_weights(self.parameters[name])
        row = math.prod(shape[1:])
        return min(start // row, shape[0]), min(-(-(start + held.numel()) // row), shape[0])

    @torch.no_grad()
    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        shape, parameter = self.specs[name].local_shape, self.parameters[name]
        if self._is_gathered(name):
            parameter.data.copy_(rows)
        if hasattr(parameter, "ds_tensor"):
            piece, first = held_weights(parameter)
            real = max(0, min(piece.numel(), math.prod(shape) - first))  # slices end in padding
            skipped = first - start * math.prod(shape[1:])
            piece.view(-1)[:real] = rows.flatten()[skipped : skipped + real]

    def _is_gathered(self, name: str) -> bool:
        """Always, but under ZeRO-3 small parameters alone, between updates."""
        return self.parameters[name].data.numel() == math.prod(self.specs[name].local_shape)


class Layout(Protocol):
    """How to reach the masters and the optimizer state of one DeepSpeed engine."""

    def updated(self) -> list[tuple[nn.Parameter, Group]]:
        """The tensors the live optimizer updates on this rank, each with the group it is of."""
        ...

    def fragments_of(self, trained: dict[str, nn.Parameter]) -> dict[int, list[Fragment]]:
        """What this rank's updated tensors hold of the parameters, by their number in `updated`."""
        ...

    def fragments(self, parameter: nn.Parameter) -> Iterator[tuple[int, Tensor]]:
        """This rank's pieces of the master of ``parameter``: (flat start, tensor sharing its memory)."""
        ...

    def read(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """The full master (``key`` None) or optimizer state tensor. Collective."""
        ...

    def write(self, parameter: nn.Parameter, key: str | None, full: Tensor) -> None:
        """Set this rank's part of the master or state tensor from its full value."""
        ...

    def refresh(self, parameter: nn.Parameter, full: Tensor) -> None:
        """Set the model's own weight from the full master, which `write` leaves stale."""
        ...


class Whole:
    """Stage 0. Masters are the parameters themselves, or float32 copies of bfloat16 ones."""

    def __init__(self, engine: Any, factory: OptimizerFactory) -> None:
        self.optimizer: torch.optim.Optimizer = engine.basic_optimizer
        self.factory = factory
        self.masters: dict[int, nn.Parameter] = {}
        groups = getattr(engine.optimizer, "fp16_groups", None)
        if groups is not None:
            for half, full in zip(groups, engine.optimizer.fp32_groups, strict=True):
                self.masters.update(zip(map(id, half), full, strict=True))

    def _master(self, parameter: nn.Parameter) -> nn.Parameter:
        return self.masters.get(id(parameter), parameter)

    def updated(self) -> list[tuple[nn.Parameter, Group]]:
        return grouped(self.optimizer)

    def fragments_of(self, trained: dict[str, nn.Parameter]) -> dict[int, list[Fragment]]:
        numbers = {id(master): number for number, (master, _) in enumerate(self.updated())}
        return {
            numbers[id(self._master(parameter))]: [Fragment(name, 0, parameter.numel(), 0)]
            for name, parameter in trained.items()
        }

    def fragments(self, parameter: nn.Parameter) -> Iterator[tuple[int, Tensor]]:
        yield 0, self._master(parameter).data

    def read(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        master = self._master(parameter)
        if key is None:
            return master.data
        return self.factory.tensors(self.optimizer, master)[key]

    def write(self, parameter: nn.Parameter, key: str | None, full: Tensor) -> None:
        self.read(parameter, key).copy_(full)

    def refresh(self, parameter: nn.Parameter, full: Tensor) -> None:
        parameter.data.copy_(full)


class Flat:
    """Stages 1 and 2 (and the separate optimizer DeepSpeed has for bfloat16 at stage 1)."""

    def __init__(self, engine: Any) -> None:
        self.wrapper = engine.optimizer

    def updated(self) -> list[tuple[nn.Parameter, Group]]:
        return grouped(self.wrapper)

    def fragments_of(self, trained: dict[str, nn.Parameter]) -> dict[int, list[Fragment]]:
        found: dict[int, list[Fragment]] = {}
        for name, parameter in trained.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
                fragment = Fragment(name, source.start, source.numel, target.start)
                found.setdefault(mapping.param_group_index, []).append(fragment)
        return found

    def link(self) -> None:
        """Let parameters find their pieces of the optimizer state, which exists from the start here."""
        self.wrapper._lazy_init_hp_params_optimizer_state()

    def fragments(self, parameter: nn.Parameter) -> Iterator[tuple[int, Tensor]]:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            yield mapping.lp_fragment_address.start, mapping.hp_fragment.data

    def read(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        full: Tensor = parameter.get_full_hp_param(key)  # type: ignore[attr-defined]
        return full

    def write(self, parameter: nn.Parameter, key: str | None, full: Tensor) -> None:
        parameter.set_full_hp_param(full, key)  # type: ignore[attr-defined]

    def refresh(self, parameter: nn.Parameter, full: Tensor) -> None:
        parameter.data.copy_(full)


class Partitioned:
    """Stage 3."""

    def __init__(self, engine: Any) -> None:
        self.wrapper = engine.optimizer

    def updated(self) -> list[tuple[nn.Parameter, Group]]:
        groups, number = self.wrapper.optimizer.param_groups, self.wrapper.sub_group_to_group_id
        return [
            (flat, groups[number[index]])
            for index, flat in enumerate(self.wrapper.fp32_partitioned_groups_flat)
        ]

    def fragments_of(self, trained: dict[str, nn.Parameter]) -> dict[int, list[Fragment]]:
        found: dict[int, list[Fragment]] = {}
        for name, parameter in trained.items():
            key = self.wrapper.get_param_id(parameter)
            group, offset, length = self.wrapper.grad_position[key]
            start = held_weights(parameter)[1]
            real = max(0, min(length, int(parameter.ds_numel) - start))  # type: ignore[attr-defined]
            if real:
                found.setdefault(group, []).append(Fragment(name, start, real, int(offset)))
        return found

    def fragments(self, parameter: nn.Parameter) -> Iterator[tuple[int, Tensor]]:
        _, start = held_weights(parameter)
        master, _ = self.wrapper._get_fp32_opt_state_partition(parameter, release_swap_buffers=True)
        yield start, master.data

    def read(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        full: Tensor = self.wrapper.get_full_hp_param(parameter, key)
        return full

    def write(self, parameter: nn.Parameter, key: str | None, full: Tensor) -> None:
        # DeepSpeed's own setter of full values fails where the ranks do not divide the size.
        self.wrapper.set_local_hp_param(_slice(parameter, full), parameter, key)

    def refresh(self, parameter: nn.Parameter, full: Tensor) -> None:
        piece, _ = held_weights(parameter)
        piece.copy_(_slice(parameter, full))
        if parameter.data.numel() == full.numel():  # small parameters stay gathered between updates
            parameter.data.copy_(full)


def _slice(parameter: nn.Parameter, full: Tensor) -> Tensor:
    """This rank's ZeRO-3 slice of a full tensor, padded with zeros to the common length."""
    piece, start = held_weights(parameter)
    part = full.flatten()[start : start + piece.numel()]
    return nn.functional.pad(part, (0, piece.numel() - part.numel()))


def layout_of(stage: int, engine: Any, factory: OptimizerFactory) -> Layout:
    """The layout of an initialised DeepSpeed engine."""
    if stage == 0:
        return Whole(engine, factory)
    return Partitioned(engine) if stage == 3 else Flat(engine)
