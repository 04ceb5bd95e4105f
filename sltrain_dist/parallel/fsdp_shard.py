"""A model on the meta device becomes FSDP2's: sharded, given memory for the local shards alone, and filled."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from sltrain_dist.parallel.engine import as_dtensor, chunk_bounds, held_part
from sltrain_dist.parallel.mesh import Mesh
from sltrain_dist.params import ParameterSpec


def shard(model: nn.Module, mesh: Mesh, half: bool, offload: OffloadPolicy) -> nn.Module:
    """Apply fully_shard to each block and the root, with gradients summed instead of averaged."""
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None,
        # one rank adds nothing up, and a float32 copy of a block's gradients is large
        reduce_dtype=torch.float32 if half and mesh.dp_size > 1 else None,
        cast_forward_inputs=False,
    )
    # Compiled blocks return views; nothing here writes into a block's output in place.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor")
    blocks = getattr(model, "blocks", ())
    for module in (*blocks, *_vocabulary(model), model):
        fully_shard(module, mesh=mesh.data_mesh, mp_policy=policy, offload_policy=offload)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # A divide factor alone becomes a pre-multiplied sum, which gloo lacks.
            module.set_force_sum_reduction_for_comms(True)
            _leave_integers_uncast(module)
    return model


def _vocabulary(model: nn.Module) -> list[nn.Module]:
    """Embedding and head, by far the largest layers: groups of their own, where they are not one tensor."""
    found = [m for name, m in model.named_modules() if name in ("model.embed_tokens", "lm_head")]
    return found if len({id(module.weight) for module in found}) == len(found) else []


def units_of(model: nn.Module, names: list[str]) -> list[list[str]]:
    """Names of parameters by the FSDP group that reduces them."""
    groups = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    units: dict[str, list[str]] = {}
    for name in names:
        inside = [group for group in groups if not group or name.startswith(group + ".")]
        units.setdefault(max(inside, key=len), []).append(name)
    return list(units.values())


def _leave_integers_uncast(module: FSDPModule) -> None:
    """Keep mixed precision away from the offsets: torch before 2.12 would cast them to bfloat16 too."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    for group in groups:
        for fsdp_param in group.fsdp_params if group is not None else ():
            if not fsdp_param.sharded_param.dtype.is_floating_point:
                settle = fsdp_param.init_dtype_attrs

                def uncast(policy: MixedPrecisionPolicy, settle: Any = settle) -> None:
                    settle(MixedPrecisionPolicy())

                fsdp_param.init_dtype_attrs = uncast


def local_range(spec: ParameterSpec, mesh: Mesh) -> tuple[int, int]:
    """Flat bounds of this rank's dim-0 chunk of what tensor parallelism leaves it of a tensor."""
    rows, *rest = spec.local_shape
    start, stop = chunk_bounds(rows, mesh.shard_size, mesh.shard_rank)
    return start * math.prod(rest), stop * math.prod(rest)


@torch.no_grad()
def fill(
    model: nn.Module, specs: dict[str, ParameterSpec], seed: int, mesh: Mesh, home: torch.device
) -> dict[str, DTensor]:
    """Give the sharded model memory and write this rank's part of every parameter; return them by name."""
    _to_real(model, home)
    sharded: dict[str, DTensor] = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        spec = specs[name]
        spec.fill(parameter.to_local(), seed, name, local_range(spec, mesh)[0])
        sharded[name] = parameter
    return sharded


def reshard(model: nn.Module) -> None:
    """Let go of gathered weights, which are stale once shards have been written."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@dataclass(frozen=True)
class Shards:
    """A filled model's shards by name; a `parallel.masks.Holder`.

    half: the model computes in bfloat16, whatever the shards are.
    """

    mesh: Mesh
    specs: dict[str, ParameterSpec]
    sharded: dict[str, DTensor]
    half: bool

    def as_dtensor(self, name: str) -> DTensor:
        """A parameter as a state has it."""
        return self._placed(name, self.sharded[name].to_local().detach())

    def whole(self, name: str) -> Tensor:
        """Weights in the format that the model computes with."""
        local = self.sharded[name].to_local().detach().to(self.mesh.device)
        if self.half and local.is_floating_point():
            local = local.bfloat16()
        return held_part(self._placed(name, local))

    def held_rows(self, name: str) -> tuple[int, int]:
        rows = self.specs[name].local_shape[0]
        return chunk_bounds(rows, self.mesh.shard_size, self.mesh.shard_rank)

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        first, last = self.held_rows(name)
        self.sharded[name].to_local().copy_(rows[first - start : last - start])

    def _placed(self, name: str, local: Tensor) -> DTensor:
        spec = self.specs[name]
        return as_dtensor(self.mesh, local, torch.Size(spec.shape), spec.cut)


def _to_real(model: nn.Module, device: torch.device) -> None:
    """Allocate the shards of a meta model; this makes two tensors of a tied one, so tie it again."""
    first_names: dict[int, str] = {}
    ties = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(parameter), name)
        if first != name:
            ties[name] = first
    # Not to_empty, which would also wipe buffers that are real already.
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    for name, first in ties.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(first))
