"""The FSDP2 engine: every block and the root sharded by `fully_shard`, on any number of ranks.

Under tensor parallelism the model comes cut, in plain tensors, and each tensor-parallel rank shards its
part over its data-parallel peers: FSDP2 sees one axis, or two for HSDP, and no product goes through
DTensor's dispatch. The model is made on the meta device, sharded there, given memory for the local shards alone, and
filled shard by shard from the parameters' specs. The optimizer sees plain local tensors that share
memory with the shards, never DTensors, so any element-wise torch optimizer works. Under --cpu_offload the
shards, their gradients and the optimizer are in host memory, pinned where there is a GPU to copy from it.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
)
from torch.distributed.tensor import DTensor

from sltrain_dist.config import EngineConfig
from sltrain_dist.parallel.engine import (
    MODEL,
    ModelFactory,
    OptimizerFactory,
    Trained,
    add_hashes,
    as_dtensor,
    check_support,
    chunk_bounds,
    clip_factor,
    count_bytes,
    grouped,
    optimizer_key,
)
from sltrain_dist.parallel.fsdp_shard import Shards, fill, local_range, reshard, shard, units_of
from sltrain_dist.parallel.masks import choose_masks, masks
from sltrain_dist.parallel.mesh import Mesh, sum_over_all
from sltrain_dist.parallel.per_layer import LayerUpdates
from sltrain_dist.parallel.quantised import Buffer, Fragment, buffer_state, load_buffers
from sltrain_dist.params import collect_specs
from sltrain_dist.utils.allocator import return_freed_memory


class FsdpEngine:
    """One FSDP2 run; the protocol is `parallel.engine.Engine`.

    Number formats: float32 throughout; bfloat16 compute on float32 masters, gradients reduced in
    float32; or pure bfloat16, whose micro-batch gradients are added up in an own float32 shard because
    FSDP2 casts reduced gradients to the parameter's dtype before it adds them.
    """

    name = "fsdp"
    copies_state = False
    skipped_blocks = 0

    def __init__(
        self,
        model_factory: ModelFactory,
        mesh: Mesh,
        config: EngineConfig,
        optimizer_factory: OptimizerFactory,
        seed: int,
    ) -> None:
        optimizer_factory.check("--engine fsdp", sharded=mesh.shard_size * mesh.tp_size > 1)
        self.mesh = mesh
        self.seed = seed
        self.factory = optimizer_factory
        self.clip = optimizer_factory.config.grad_clipping
        self.sync_last_only = config.grad_sync == "last"
        self.updates = 0
        half = config.dtype == "bfloat16"
        pure = half and not config.master_weights
        model = model_factory(device="meta", dtype=torch.bfloat16 if pure else torch.float32)
        self.specs = collect_specs(model)
        check_support(mesh, self.specs, seed)
        self.home = torch.device("cpu") if config.cpu_offload else mesh.device  # of the shards
        pinned = mesh.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=pinned) if config.cpu_offload else OffloadPolicy()
        self.module: nn.Module = shard(model, mesh, half, offload)
        self.sharded = fill(self.module, self.specs, seed, mesh, self.home)
        self.shards = Shards(mesh, self.specs, self.sharded, half)
        self.local = {
            name: nn.Parameter(parameter.to_local().detach())
            for name, parameter in self.sharded.items()
            if parameter.requires_grad
        }
        # Ranks beyond a small tensor's rows hold nothing of it; optimizers need not see that.
        self.optimizer = optimizer_factory.build(
            [
                Trained(name, self._keyed(name, local), math.prod(self.specs[name].shape))
                for name, local in self.local.items()
                if local.numel()
            ]
        )
        optimizer_factory.begin(self.optimizer, grouped(self.optimizer), 0)
        self._sums: dict[str, Tensor] = {}
        if pure and config.gradient_accumulation > 1 and not self.sync_last_only:
            self._accumulate_in_float32()
        self._left_alone: list[str] = []  # by per-layer updates, this time
        self._layers: LayerUpdates | None = None
        if config.per_layer:
            lagged = optimizer_factory.config.per_layer_clip == "lagged"
            units = units_of(self.module, list(self.local))
            self._layers = LayerUpdates(mesh, units, self.sharded, self._update, lagged)
            if mesh.device.type == "cpu":
                self._trim_heap()

    def begin_update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def accumulate(self, loss: Tensor, *, last: bool) -> None:
        if self._layers is not None and not self._layers.admit(loss, last):
            return
        if self.sync_last_only:
            assert isinstance(self.module, FSDPModule)
            self.module.set_requires_gradient_sync(last)
        loss.backward()

    def step(self, lr: float) -> float:
        self.begin_update(lr)
        norm = self._update(self.local) if self._layers is None else self._layers.finish()
        if math.isfinite(norm):
            self.updates += 1
            for name in self._left_alone:  # a checkpoint has one counter for all
                state = self.optimizer.state.get(self.local[name], {})
                if "step" in state:
                    state["step"] = state["step"] + 1
        self._left_alone.clear()
        self._forget(self.sharded)  # what an update left that ended before its last micro-batch
        return norm

    def _update(self, names: Iterable[str], norm_before: float | None = None) -> float:
        """Clip and update these parameters; returns their norm, not finite where they were left alone.

        norm_before: what they are clipped by instead of their own norm.
        """
        self._settle()
        gradients = {name: self._gradient(name) for name in names}
        norm = self._global_norm(gradients)
        if math.isfinite(value := norm.item()):
            if self.clip > 0:
                limiting = norm if norm_before is None else norm.new_tensor(norm_before)
                torch._foreach_mul_(list(gradients.values()), clip_factor(limiting, self.clip))
            for name, gradient in gradients.items():
                self.local[name].grad = gradient.to(self.local[name].dtype)
            self.optimizer.step()
        elif self._layers is not None:
            self.skipped_blocks += 1
            self._left_alone += names
        self._forget(names)
        if self._layers is not None and self.mesh.device.type == "cpu":
            return_freed_memory()
        return value

    def _forget(self, names: Iterable[str]) -> None:
        """Drop the gradients of these parameters."""
        for name in names:
            self.sharded[name].grad = None
            self._sums.pop(name, None)
            if name in self.local:
                self.local[name].grad = None

    def state(self) -> dict[str, DTensor]:
        return self._plain_state() | buffer_state(self.mesh, self.buffers())

    def buffers(self) -> list[Buffer]:
        buffers = []
        for name, local in self.local.items():
            if self._bits(name) == 8:
                start, stop = local_range(self.specs[name], self.mesh)
                largest = chunk_bounds(self.specs[name].local_shape[0], self.mesh.shard_size, 0)[1]
                numel = largest * math.prod(self.specs[name].local_shape[1:])
                fragments = (Fragment(name, start, stop - start, 0),) if local.numel() else ()
                tensors = self.factory.moments(self.optimizer, local)
                buffers.append(Buffer(name, tensors, numel, fragments))
        return buffers

    def _bits(self, name: str) -> int:
        return self.factory.bits(name, math.prod(self.specs[name].shape))

    def _plain_state(self) -> dict[str, DTensor]:
        state = {}
        for name, local in self.local.items():
            shape, cut = torch.Size(self.specs[name].shape), self.specs[name].cut
            state[MODEL + name] = as_dtensor(self.mesh, local.detach(), shape, cut)
            if self._bits(name) == 8:
                continue
            for key, tensor in self._optimizer_tensors(name, local).items():
                whole = shape if tensor.shape == local.shape else tensor.shape
                state[optimizer_key(key, name)] = as_dtensor(self.mesh, tensor, whole, cut)
        return state | {MODEL + name: self.shards.as_dtensor(name) for name in masks(self.specs)}

    def load_state(self, state: dict[str, DTensor], scalars: dict[str, Any]) -> None:
        assert isinstance(self.module, FSDPModule)
        self.updates = int(scalars["updates"])
        self.skipped_blocks = int(scalars.get("skipped_blocks", 0))
        if self._layers is not None:
            self._layers.last_norm = scalars.get("last_norm")
        updated = grouped(self.optimizer)
        self.factory.begin(self.optimizer, updated, int(scalars["optimizer_steps"]))
        own = self._plain_state()
        quantised = load_buffers(self.mesh, self.buffers(), state)
        assert state.keys() == own.keys() | quantised, state.keys() ^ (own.keys() | quantised)
        for name, tensor in own.items():
            source = state[name].to_local()
            if source.data_ptr() != tensor.to_local().data_ptr():
                tensor.to_local().copy_(source)
        reshard(self.module)  # after an evaluation the root still holds gathered weights

    def scalars(self) -> dict[str, Any]:
        scalars: dict[str, Any] = {"updates": self.updates, "optimizer_steps": self.updates}
        if self._layers is not None:
            norm = self._layers.last_norm
            scalars |= {"skipped_blocks": self.skipped_blocks, "last_norm": norm}
        return scalars

    def held_bytes(self) -> dict[str, int]:
        shards = ((p.to_local(), p.requires_grad) for p in self.sharded.values())
        return count_bytes(shards, self.optimizer)

    def choose_masks(self) -> None:
        choose_masks(self.specs, self.shards)
        reshard(self.module)

    def support_hash(self) -> int:
        total = 0
        for name, spec in self.specs.items():
            if spec.kind == "indices":
                start, _ = local_range(spec, self.mesh)
                total += spec.partial_hash(self.seed, name, start, self.sharded[name].to_local())
        return add_hashes(self.mesh, total & 0xFFFFFFFFFFFFFFFF, self.mesh.replicate_size)

    def _optimizer_tensors(self, name: str, local: nn.Parameter) -> dict[str, Tensor]:
        if local.numel():
            return self.factory.tensors(self.optimizer, local)
        return {
            key: local.detach().clone()
            for key in self.factory.state_names(name, self.specs[name].shape)
        }

    def _settle(self) -> None:
        """Wait for gradients on their way to the host: torch before 2.13 calls hooks without having waited."""
        if self.home.type == "cpu" and self.mesh.device.type == "cuda":
            torch.cuda.current_stream(self.mesh.device).synchronize()

    def _gradient(self, name: str) -> Tensor:
        """The summed gradient of the local shard; zeros where no loss reached the parameter."""
        if name in self._sums:
            return self._sums[name]
        grad = self.sharded[name].grad
        return grad.to_local() if isinstance(grad, DTensor) else torch.zeros_like(self.local[name])

    def _keyed(self, name: str, local: nn.Parameter) -> nn.Parameter:
        """The parameter with what stochastic rounding draws its numbers from: replicas draw the same."""
        place = 0 if self.specs[name].cut is None else self.mesh.tp_rank
        position = place * self.mesh.shard_size + self.mesh.shard_rank
        local.rounding_key = f"{name} {position}"  # type: ignore[attr-defined]
        return local

    def _global_norm(self, gradients: dict[str, Tensor]) -> Tensor:
        """L2 norm over all shards of all ranks, float32 scalar where the shards are; squares are added in float64.

        What tensor-parallel ranks hold in common counts on the first of them.
        """
        norms = [
            torch.linalg.vector_norm(gradient, dtype=torch.float32)
            for name, gradient in gradients.items()
            if gradient.numel() and (self.specs[name].cut is not None or self.mesh.tp_rank == 0)
        ]
        squares = torch.zeros((), dtype=torch.float64, device=self.home)
        if norms:
            squares = torch.stack(norms).double().square_().sum()
        total = sum_over_all(self.mesh, squares.to(self.mesh.device)) / self.mesh.replicate_size
        return total.sqrt().float().to(self.home)

    def _trim_heap(self) -> None:
        """Return what a block's forward has freed, its gathered weights first, before the next one's are gathered."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule) and module is not self.module:
                module.register_forward_hook(lambda *_: return_freed_memory())

    def _accumulate_in_float32(self) -> None:
        """Move each reduced bfloat16 gradient into a float32 sum as soon as FSDP2 has written it."""
        for name in self.local:

            def move(parameter: Tensor, name: str = name) -> None:
                grad = parameter.grad
                assert isinstance(grad, DTensor)
                self._settle()
                reduced = grad.to_local().float()
                self._sums[name] = self._sums[name].add_(reduced) if name in self._sums else reduced
                parameter.grad = None

            self.sharded[name].register_post_accumulate_grad_hook(move)
