"""The DeepSpeed engine: ZeRO stages 0 to 3 around our own torch optimizer. The one file that imports deepspeed.

DeepSpeed distributes and steps; this file makes it agree with the protocol: gradients summed instead of
averaged, a global norm from every stage, initial values from the parameters' specs (ZeRO-3 never holds
the model whole), and optimizer and master weights readable and writable as Shard(0) DTensors.
"""

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sltrain_dist.config import EngineConfig
from sltrain_dist.parallel.ds_config import FLAG, resolve_ds_config, stage_of
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
    held_part,
    optimizer_key,
)
from sltrain_dist.parallel.masks import choose_masks, masks
from sltrain_dist.parallel.materialise import OneByOne
from sltrain_dist.parallel.mesh import Mesh, sum_over_all
from sltrain_dist.parallel.quantised import Buffer, buffer_state, load_buffers
from sltrain_dist.parallel.zero_layout import Flat, Slices, held_weights, layout_of
from sltrain_dist.params import collect_specs
from sltrain_dist.utils.errors import UserError


def load_deepspeed() -> Any:
    """Import DeepSpeed: quiet, on this machine's device, compiling nothing."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Its collectives' old names, once per call site and rank.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.utils.logger.addFilter(_is_news)
    # Otherwise it probes for a compiler, and on CPU builds a shared-memory all-reduce (for inference) at start.
    deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})
    return deepspeed


def _is_news(record: logging.LogRecord) -> bool:
    """Drop the warning that DeepSpeed has not tested our optimizer: our own tests do."""
    return "untested optimizer" not in str(record.msg)


class ZeroEngine:
    """One DeepSpeed run; the protocol is `parallel.engine.Engine`."""

    copies_state = True
    skipped_blocks = 0

    def __init__(
        self,
        model_factory: ModelFactory,
        mesh: Mesh,
        config: EngineConfig,
        optimizer_factory: OptimizerFactory,
        seed: int,
    ) -> None:
        resolved = resolve_ds_config(
            config.ds_config, config, optimizer_factory.config, mesh.dp_size
        )
        self.stage = stage_of(resolved)
        self.name = f"zero-{self.stage}"
        sharded = self.stage > 0 or mesh.tp_size > 1
        optimizer_factory.check(f"ZeRO stage {self.stage}", sharded=sharded)
        self.mesh = mesh
        self.seed = seed
        self.factory = optimizer_factory
        self.updates = 0
        self.half = config.dtype == "bfloat16"
        self._own_clip = 0.0
        if self.stage == 0 and not self.half:
            # There DeepSpeed has no norm to report, so norm and clipping are done here.
            self._own_clip = resolved["gradient_clipping"]
            resolved["gradient_clipping"] = 0.0
        deepspeed = load_deepspeed()
        deepspeed.init_distributed(verbose=False)  # finds the process group of mesh.py
        self._mpu = ModelParallelUnit(mesh)
        _check_by_deepspeed(deepspeed, resolved, self._mpu)
        model = model_factory(device="meta", dtype=torch.bfloat16 if self.half else torch.float32)
        self.specs = collect_specs(model)
        check_support(mesh, self.specs, seed)
        self._materialise(deepspeed, model, resolved)
        self.parameters = dict(model.named_parameters())
        for name, parameter in self.parameters.items():  # read by DeepSpeed's norms
            cut = self.specs[name].cut is not None
            parameter.tensor_model_parallel = parameter.model_parallel = cut  # type: ignore[attr-defined]
        self.slices = Slices(mesh.dp_group, self.specs, self.parameters)
        self.trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self._fill()
        self.support_hash()  # compares replicas, before DeepSpeed's broadcast hides a difference
        built = optimizer_factory.build(
            [Trained(name, p, self._numel(name)) for name, p in self.trained.items()]
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it prints memory reports past its logger
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=built,
                config=resolved,
                dist_init_required=False,
                mpu=self._mpu,
            )
        self.module: nn.Module = self._engine
        self.optimizer: torch.optim.Optimizer = self._engine.basic_optimizer
        self.layout = layout_of(self.stage, self._engine, optimizer_factory)
        self._begin(0)
        if self.half and config.master_weights:
            self._fill_masters()

    def begin_update(self, lr: float) -> None:
        pass

    def accumulate(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # Multiplied by dp_size because DeepSpeed divides the sum of gradients by it.
        self._engine.backward(loss * self.mesh.dp_size, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = self._clip_replicated() if self.stage == 0 and not self.half else None
        if norm is not None and not math.isfinite(norm):
            self._engine.zero_grad()
            return norm
        self._engine.step()
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
            if not self._engine.was_step_applied():
                return math.inf
        self.updates += 1
        return norm

    def state(self) -> dict[str, DTensor]:
        state = {}
        for label, name, parameter, key in self._entries():
            full, spec = self.layout.read(parameter, key), self.specs[name]
            start, stop = chunk_bounds(full.shape[0], self.mesh.dp_size, self.mesh.dp_rank)
            # To host memory at once: the device holds one gathered tensor at a time.
            own = full[start:stop].to("cpu", copy=True)
            shape = spec.shape if full.shape == spec.local_shape else full.shape
            state[label] = as_dtensor(self.mesh, own, torch.Size(shape), spec.cut)
        for name in masks(self.specs):
            full, spec = self.slices.whole(name), self.specs[name]
            start, stop = chunk_bounds(full.shape[0], self.mesh.dp_size, self.mesh.dp_rank)
            own = full[start:stop].to("cpu", copy=True)
            state[MODEL + name] = as_dtensor(self.mesh, own, torch.Size(spec.shape), spec.cut)
        return state | buffer_state(self.mesh, self.buffers(), copies=True)

    def buffers(self) -> list[Buffer]:
        held = self.layout.fragments_of(self.trained)
        buffers = []
        for number, (updated, group) in enumerate(self.layout.updated()):
            if group["bits"] == 8:
                tensors = self.factory.moments(self.optimizer, updated)
                fragments = tuple(held.get(number, ()))
                shared = self.stage == 0
                buffers.append(Buffer(str(number), tensors, updated.numel(), fragments, shared))
        return buffers

    def _numel(self, name: str) -> int:
        return math.prod(self.specs[name].shape)

    def load_state(self, state: dict[str, DTensor], scalars: dict[str, Any]) -> None:
        self.updates = int(scalars["updates"])
        self._begin(int(scalars["optimizer_steps"]))
        labels = load_buffers(self.mesh, self.buffers(), state)
        for label, _, parameter, key in self._entries():
            labels.add(label)
            full = held_part(state[label]).to(self.mesh.device)
            self.layout.write(parameter, key, full)
            if key is None:
                self.layout.refresh(parameter, full)
        for name in masks(self.specs):
            labels.add(MODEL + name)
            self.slices.write_rows(name, 0, held_part(state[MODEL + name]).to(self.mesh.device))
        assert state.keys() == labels, state.keys() ^ labels

    def scalars(self) -> dict[str, Any]:
        return {"updates": self.updates, "optimizer_steps": self.updates}

    def held_bytes(self) -> dict[str, int]:
        held = []
        for parameter in self.parameters.values():
            held.append((held_weights(parameter)[0], parameter.requires_grad))
            if self.stage == 3 and parameter.data.numel() > 1:  # small ones stay gathered
                held.append((parameter.data, parameter.requires_grad))
        return count_bytes(held, self.optimizer)

    def support_hash(self) -> int:
        replicas = self.mesh.dp_size if self.stage < 3 else 1
        return add_hashes(self.mesh, self._own_hash(), replicas)

    def choose_masks(self) -> None:
        choose_masks(self.specs, self.slices)

    def _entries(self) -> Iterator[tuple[str, str, nn.Parameter, str | None]]:
        """(name in a state, its own name, parameter, optimizer state or None: the weight) of all a checkpoint holds."""
        for name, parameter in self.trained.items():
            yield MODEL + name, name, parameter, None
            if self.factory.bits(name, self._numel(name)) == 8:
                continue
            for key in self.factory.state_names(name, self.specs[name].shape):
                yield optimizer_key(key, name), name, parameter, key

    def _begin(self, steps: int) -> None:
        """Create missing optimizer state and set its step counters."""
        self.factory.begin(self.optimizer, self.layout.updated(), steps)
        if isinstance(self.layout, Flat):
            self.layout.link()

    def _materialise(self, deepspeed: Any, model: nn.Module, resolved: dict[str, Any]) -> None:
        """Give every parameter memory; under stage 3 one at a time, cut before the next one exists."""
        source = OneByOne(model, self.mesh.device)
        if self.stage == 3:
            group = self.mesh.dp_group
            deepspeed.zero.Init(
                module=source,
                config_dict_or_path=resolved,
                mpu=self._mpu,
                data_parallel_group=group,
            )
        else:
            list(source.parameters())
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.mesh.device)

    @torch.no_grad()
    def _fill(self) -> None:
        """Write initial values: of whole parameters, under stage 3 of the slices this rank holds."""
        for name, parameter in self.parameters.items():
            held, start = held_weights(parameter)
            self._initial(name, held, start)

    @torch.no_grad()
    def _fill_masters(self) -> None:
        """Start float32 masters from the float32 initial values, not from their bfloat16 rounding."""
        for name, parameter in self.trained.items():
            for start, master in self.layout.fragments(parameter):
                self._initial(name, master, start)

    def _initial(self, name: str, held: Tensor, start: int) -> None:
        """Write initial values of the flat elements from ``start`` on into ``held``; zeros past the end."""
        spec = self.specs[name]
        real = max(0, min(held.numel(), math.prod(spec.local_shape) - start))
        flat = held.view(-1)
        flat[real:] = 0
        spec.fill(flat[:real], self.seed, name, start)

    def _own_hash(self) -> int:
        """Hash of the offsets this rank holds: of all, or of its slices under stage 3."""
        total = 0
        for name, spec in self.specs.items():
            if spec.kind == "indices":
                held, start = held_weights(self.parameters[name])
                real = max(0, min(held.numel(), math.prod(spec.local_shape) - start))
                total += spec.partial_hash(self.seed, name, start, held.flatten()[:real])
        return total & 0xFFFFFFFFFFFFFFFF

    def _clip_replicated(self) -> float:
        """Stage 0: the norm of the gradients, equal over data-parallel ranks, and clipping by it."""
        trained = {name: p.grad for name, p in self.trained.items() if p.grad is not None}
        norms = {name: torch.linalg.vector_norm(grad) for name, grad in trained.items()}
        squares = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for name, norm in norms.items():
            if self.specs[name].cut is not None or self.mesh.tp_rank == 0:
                squares += norm.double().square()
        if self.mesh.tp_size > 1:
            squares = sum_over_all(self.mesh, squares) / self.mesh.dp_size
        norm = squares.sqrt().float()
        if self._own_clip > 0:
            torch._foreach_mul_(list(trained.values()), clip_factor(norm, self._own_clip))
        return norm.item()


class ModelParallelUnit:
    """What DeepSpeed asks about tensor and data parallelism: its ``mpu``."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.tp_size

    def get_model_parallel_group(self) -> Any:
        return self._mesh.tp_group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.dp_size

    def get_data_parallel_group(self) -> Any:
        return self._mesh.dp_group


def _check_by_deepspeed(deepspeed: Any, resolved: dict[str, Any], mpu: ModelParallelUnit) -> None:
    """Let DeepSpeed parse the configuration before a model exists; its refusal is the user's to mend."""
    try:
        deepspeed.DeepSpeedConfig(resolved, mpu)
    except (AssertionError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{FLAG}: DeepSpeed refuses it: {reason}") from None
