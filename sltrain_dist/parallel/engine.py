"""What a training engine is, and the one table of them.

An engine takes a model that exists only as shapes (meta device), distributes it, fills it, and then
offers the loop four verbs: call the module, `accumulate`, `step`, and the checkpoint pair `state` and
`load_state`. Back ends differ behind this protocol and nowhere else.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from sltrain_dist.config import EngineConfig, OptimizerConfig
from sltrain_dist.parallel.mesh import Mesh, gather_objects
from sltrain_dist.params import Cut, ParameterSpec, partial_hash
from sltrain_dist.utils.errors import UserError

if TYPE_CHECKING:
    from sltrain_dist.parallel.quantised import Buffer

MODEL = "model."  # prefix of weights in a state
_SAMPLED_OFFSETS = 256  # of each layer's support, compared at start
OPTIMIZER = "optimizer."  # prefix of optimizer state tensors: optimizer.<state>.<parameter>


class ModelFactory(Protocol):
    """Makes the model with uninitialised parameters of one floating dtype, usually on the meta device."""

    def __call__(self, *, device: torch.device | str, dtype: torch.dtype) -> nn.Module: ...


@dataclass(frozen=True)
class Trained:
    """What an engine hands to an optimizer: a plain tensor that this rank updates a part of, or all.

    numel: elements of the whole parameter over all ranks, by which its treatment is decided.
    """

    name: str
    parameter: nn.Parameter
    numel: int


Group = dict[str, Any]  # a parameter group of a torch optimizer


class OptimizerFactory(Protocol):
    """What an engine needs to know of an optimizer; optim/table.py has the implementation."""

    @property
    def config(self) -> OptimizerConfig:
        """The flags it was made from."""
        ...

    def check(self, description: str, sharded: bool) -> None:
        """Raise UserError where the optimizer cannot work on shards (``sharded``) under ``description``."""
        ...

    def build(self, trained: Sequence[Trained]) -> torch.optim.Optimizer:
        """The live optimizer over plain local tensors; the list may be empty on a rank."""
        ...

    def begin(
        self,
        optimizer: torch.optim.Optimizer,
        updated: Iterable[tuple[nn.Parameter, Group]],
        step: int,
    ) -> None:
        """Create missing state tensors as zeros and set every step counter to ``step``.

        ``updated``: what the optimizer updates, each with the group that it is of; see `grouped`.
        """
        ...

    def tensors(
        self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter
    ) -> dict[str, Tensor]:
        """The state tensors of a parameter that a checkpoint must hold, by name; no step counters."""
        ...

    def moments(
        self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter
    ) -> dict[str, Tensor]:
        """Of a parameter with 8-bit moments codes and scales, flat, as `quantised.Buffer.tensors` has them."""
        ...

    def state_names(self, name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """Names that ``tensors`` has for the parameter ``name`` of this shape over all ranks."""
        ...

    def bits(self, name: str, numel: int) -> int:
        """8 or 32: how the moments of the parameter ``name`` of so many elements over all ranks are kept."""
        ...


def grouped(optimizer: torch.optim.Optimizer) -> list[tuple[nn.Parameter, Group]]:
    """Every parameter of an optimizer with its group."""
    return [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]


class Engine(Protocol):
    """A distributed model with its optimizer.

    name: "fsdp" or "zero-<stage>". module: call ``module(tokens, labels)``.
    skipped_blocks: blocks that per-layer updates left alone so far, for a gradient that was not finite.
    specs: of the module's parameters. optimizer: the live torch optimizer, for the summary and its check.
    copies_state: whether `state` gives copies in host memory, not the live tensors.
    """

    name: str
    copies_state: bool
    skipped_blocks: int
    mesh: Mesh
    module: nn.Module
    specs: dict[str, ParameterSpec]
    optimizer: torch.optim.Optimizer

    def begin_update(self, lr: float) -> None:
        """Say with which learning rate the next `step` will be, before the update's first micro-batch.

        Needed where weights change inside the last backward pass (per-layer updates).
        """
        ...

    def accumulate(self, loss: Tensor, *, last: bool) -> None:
        """Run the backward pass of one micro-batch.

        Gradients become the plain SUM, over ranks and micro-batches, of what autograd gives, so ``loss``
        must already be divided by the number of valid tokens of the whole update over all ranks.
        ``last`` marks the last micro-batch of an update; `step` must follow it.
        """
        ...

    def step(self, lr: float) -> float:
        """Clip to the global norm, update the weights with learning rate ``lr``, clear the gradients.

        Returns:
            the global L2 norm of the gradient before clipping. If it is not finite the weights are
            left as they are (in every engine), and the value returned is not finite.
        """
        ...

    def state(self) -> dict[str, DTensor]:
        """What a checkpoint holds: "model.<parameter>", "optimizer.<state>.<parameter>", and `quantised` moments.

        Trainable parameters and masks, as `as_dtensor` cuts them, float32 masters where there are any. To be
        read, or to be loaded into and handed to `load_state`. Collective under ZeRO.
        """
        ...

    def buffers(self) -> "list[Buffer]":
        """This rank's 8-bit moments, as they lie in memory."""
        ...

    def load_state(self, state: dict[str, DTensor], scalars: dict[str, Any]) -> None:
        """Take over ``state`` (same names and global shapes as `state` gives) and ``scalars``."""
        ...

    def scalars(self) -> dict[str, Any]:
        """JSON-able state beside the tensors: the number of updates done."""
        ...

    def held_bytes(self) -> dict[str, int]:
        """What this rank's memory has while nothing is gathered: "parameters", "offsets" and "moments", in bytes.

        Parameters are those the model computes with; float32 masters beside them are not counted.
        """
        ...

    def support_hash(self) -> int:
        """Layout-free hash of the offsets that are really on the devices (params.partial_hash)."""
        ...

    def choose_masks(self) -> None:
        """Choose the second masks of method slope from the weights as they are (parallel.masks); collective."""
        ...


def chunk_bounds(length: int, parts: int, index: int) -> tuple[int, int]:
    """Bounds of chunk ``index`` where ``torch.chunk`` (so Shard(0) too) cuts ``length`` into ``parts``."""
    size = -(-length // parts) if length else 0
    return min(index * size, length), min((index + 1) * size, length)


def as_dtensor(mesh: Mesh, local: Tensor, shape: torch.Size, cut: Cut | None = None) -> DTensor:
    """Wrap this rank's part of a tensor of global ``shape``; the storage is shared.

    cut: how tensor parallelism cuts it, None: not at all. Of the part that gives, ``local`` is the
    chunk along dimension 0 of this rank's place on the "shard" axis; replicas hold the same.
    A part in host memory becomes a DTensor on the mesh of hosts.
    """
    stride = torch.empty(shape, device="meta").stride()
    axes = mesh.host_mesh if local.device.type == "cpu" else mesh.device_mesh
    first: Placement = Replicate() if cut is None else Shard(cut.dim)
    placements = (first, Replicate(), Shard(0))
    return DTensor.from_local(local, axes, placements, run_check=False, shape=shape, stride=stride)


def held_part(tensor: DTensor) -> Tensor:
    """What this tensor-parallel rank holds of a state tensor, over all data-parallel ranks; collective."""
    first, *_ = tensor.placements
    return tensor.redistribute(placements=(first, Replicate(), Replicate())).to_local()


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """What gradients of global norm ``norm`` are multiplied by: limit / (norm + 1e-6), at most 1."""
    return (limit / (norm + 1e-6)).clamp(max=1.0)


def count_bytes(
    parameters: Iterable[tuple[Tensor, bool]], optimizer: torch.optim.Optimizer
) -> dict[str, int]:
    """`Engine.held_bytes` of (tensor, whether it is trained) and the states of ``optimizer``."""
    held = {"parameters": 0, "offsets": 0, "moments": 0}
    for tensor, trained in parameters:
        held["parameters" if trained else "offsets"] += tensor.numel() * tensor.element_size()
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and name != "step":
                held["moments"] += value.numel() * value.element_size()
    return held


def add_hashes(mesh: Mesh, own: int, ranks_with_same: int = 1) -> int:
    """The support's hash from the partial hashes of all ranks: their sum mod 2**64, each part once.

    ranks_with_same: data-parallel ranks that hold the same part (replicas of ZeRO below stage 3, or HSDP).

    Raises:
        UserError: replicas differ, which DeepSpeed's broadcast of rank 0's parameters would hide.
    """
    everyone = [int(part) for part in gather_objects(mesh, own)]
    distinct, total = mesh.dp_size // ranks_with_same, 0
    for rank, part in enumerate(everyone):
        dp_rank, tp_rank = divmod(rank, mesh.tp_size)
        first = dp_rank % distinct * mesh.tp_size + tp_rank
        if part != everyone[first]:
            raise UserError(
                f"the support on rank {rank} differs from rank {first}'s: the ranks run different code,"
                " seeds or configurations; give all nodes the same"
            )
        total += part if rank == first else 0
    return total & 0xFFFFFFFFFFFFFFFF


def check_support(mesh: Mesh, specs: dict[str, ParameterSpec], seed: int) -> None:
    """Compare what every rank makes of the supports' first tiles, where no rank holds another's tiles.

    A rank with another seed, other code or other kernels would otherwise contribute a pattern of its own.

    Raises:
        UserError: naming the first rank that differs from rank 0.
    """
    own = 0
    for name, spec in specs.items():
        if spec.kind == "indices":
            sample = min(_SAMPLED_OFFSETS, math.prod(spec.shape))
            own += partial_hash(seed, name, 0, spec.initial.flat(seed, name, 0, sample))
            if len(spec.shape) == 1:
                break  # a support of kind uniform is made whole or not at all: one layer must do
    everyone = gather_objects(mesh, (own & 0xFFFFFFFFFFFFFFFF, seed))
    for rank, found in enumerate(everyone):
        if found != everyone[0]:
            raise UserError(
                f"--seed {everyone[0][1]}: rank {rank} makes another sparse support than rank 0"
                f" (hash {found[0]:016x}, seed {found[1]}; rank 0 {everyone[0][0]:016x}); give all nodes"
                " the same seed, model, code and kernels"
            )


def optimizer_key(state_name: str, parameter_name: str) -> str:
    """Name of one optimizer state tensor in a state."""
    return f"{OPTIMIZER}{state_name}.{parameter_name}"


Builder = Callable[[ModelFactory, Mesh, EngineConfig, OptimizerFactory, int], Engine]


def _fsdp(*args: Any) -> Engine:
    from sltrain_dist.parallel.fsdp import FsdpEngine

    return FsdpEngine(*args)


def _zero(*args: Any) -> Engine:
    from sltrain_dist.parallel.zero import ZeroEngine

    return ZeroEngine(*args)


ENGINES: dict[str, Builder] = {"fsdp": _fsdp, "zero": _zero}


def load_libraries(engine: str) -> None:
    """Import what the engine needs, as building it would: libraries take memory, too."""
    if engine == "zero":
        from sltrain_dist.parallel.zero import load_deepspeed

        load_deepspeed()
    else:
        import sltrain_dist.parallel.fsdp  # noqa: F401


def build_engine(
    model_factory: ModelFactory,
    mesh: Mesh,
    engine_config: EngineConfig,
    optimizer_factory: OptimizerFactory,
    seed: int,
) -> Engine:
    """Build the engine the configuration names: model, distribution, initial values, optimizer.

    Args:
        model_factory: makes the model with empty parameters on a given device.
        seed: of the support and the initial values (MethodConfig.seed).

    Raises:
        UserError: an unknown engine, or a combination it refuses; raised before the model exists.
    """
    if engine_config.engine not in ENGINES:
        raise UserError(
            f"--engine {engine_config.engine}: unknown; engines are {', '.join(ENGINES)}"
        )
    builder = ENGINES[engine_config.engine]
    engine = builder(model_factory, mesh, engine_config, optimizer_factory, seed)
    engine.choose_masks()
    return engine
