"""What a training engine is, and the one table of them.

An engine takes a model that exists only as shapes (meta device), distributes it, fills it, and then
offers the loop four verbs: call the module, `accumulate`, `step`, and the checkpoint pair `state` and
`load_state`. Back ends differ behind this protocol and nowhere else.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from sltrain_dist.config import EngineConfig, OptimizerConfig
from sltrain_dist.parallel.mesh import Mesh, gather_objects
from sltrain_dist.utils.errors import UserError

MODEL = "model."  # prefix of weights in a state
OPTIMIZER = "optimizer."  # prefix of optimizer state tensors: optimizer.<state>.<parameter>


class ModelFactory(Protocol):
    """Makes the model with uninitialised parameters of one floating dtype, usually on the meta device."""

    def __call__(self, *, device: torch.device | str, dtype: torch.dtype) -> nn.Module: ...


class OptimizerFactory(Protocol):
    """What an engine needs to know of an optimizer; optim/table.py has the implementation."""

    @property
    def config(self) -> OptimizerConfig:
        """The flags it was made from."""
        ...

    def check(self, description: str, sharded: bool) -> None:
        """Raise UserError where the optimizer cannot work on shards (``sharded``) under ``description``."""
        ...

    def build(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The live optimizer over plain local tensors; the list may be empty on a rank."""
        ...

    def begin(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], step: int
    ) -> None:
        """Create missing state tensors as zeros and set every step counter to ``step``."""
        ...

    def tensors(
        self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter
    ) -> dict[str, Tensor]:
        """The state tensors of a parameter that a checkpoint must hold, by name; no step counters."""
        ...

    def state_names(self, parameter_dim: int) -> tuple[str, ...]:
        """Names that ``tensors`` has for a parameter with so many dimensions."""
        ...


class Engine(Protocol):
    """A distributed model with its optimizer.

    name: "fsdp" or "zero-<stage>". module: call ``module(tokens, labels)``.
    optimizer: the live torch optimizer, for the summary and its check.
    copies_state: whether `state` gives copies in host memory, not the live tensors.
    """

    name: str
    copies_state: bool
    mesh: Mesh
    module: nn.Module
    optimizer: torch.optim.Optimizer

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
        """What a checkpoint holds: "model.<parameter>" and "optimizer.<state>.<parameter>".

        Trainable parameters only, Shard(0) on the dp axis, float32 masters where there are any. To be
        read, or to be loaded into and handed to `load_state`. Collective under ZeRO.
        """
        ...

    def load_state(self, state: dict[str, DTensor], scalars: dict[str, Any]) -> None:
        """Take over ``state`` (same names and global shapes as `state` gives) and ``scalars``."""
        ...

    def scalars(self) -> dict[str, Any]:
        """JSON-able state beside the tensors: the number of updates done."""
        ...

    def support_hash(self) -> int:
        """Layout-free hash of the offsets that are really on the devices (params.partial_hash)."""
        ...


def chunk_bounds(length: int, parts: int, index: int) -> tuple[int, int]:
    """Bounds of chunk ``index`` where ``torch.chunk`` (so Shard(0) too) cuts ``length`` into ``parts``."""
    size = -(-length // parts) if length else 0
    return min(index * size, length), min((index + 1) * size, length)


def as_dtensor(mesh: Mesh, local: Tensor, shape: torch.Size) -> DTensor:
    """Wrap this rank's dim-0 chunk of a tensor of global ``shape``; the storage is shared.

    A chunk in host memory becomes a DTensor on the mesh of hosts.
    """
    stride = torch.empty(shape, device="meta").stride()
    axis = mesh.host_mesh if local.device.type == "cpu" else mesh.device_mesh
    return DTensor.from_local(local, axis, [Shard(0)], run_check=False, shape=shape, stride=stride)


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """What gradients of global norm ``norm`` are multiplied by: limit / (norm + 1e-6), at most 1."""
    return (limit / (norm + 1e-6)).clamp(max=1.0)


def add_hashes(mesh: Mesh, own: int) -> int:
    """The support's hash from the partial hashes of all ranks: their sum mod 2**64."""
    return sum(int(part) for part in gather_objects(mesh, own)) & 0xFFFFFFFFFFFFFFFF


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
    return builder(model_factory, mesh, engine_config, optimizer_factory, seed)
