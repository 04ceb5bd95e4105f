"""What the engine tests train: a tiny model, deterministic batches, and a loop of a few lines.

Labels are ignored in unequal numbers per rank and micro-batch, so that an engine that averages
averages, instead of summing token losses, gives another curve.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sltrain_dist.config import EngineConfig, MethodConfig, ModelConfig, OptimizerConfig
from sltrain_dist.model.llama import Llama
from sltrain_dist.model.tensor_parallel import check_tensor_parallel, parallelize
from sltrain_dist.ops.linear import Path
from sltrain_dist.optim import OptimizerFactory
from sltrain_dist.parallel.engine import Engine, ModelFactory, build_engine
from sltrain_dist.parallel.mesh import Mesh, initialise
from sltrain_dist.parallel.tensor import TensorParallel, tensor_parallel
from sltrain_dist.params.linears import SLTrain
from sltrain_dist.train import update as updates

LENGTH, GLOBAL_BATCH, ACCUMULATION = 16, 8, 2
METHOD = MethodConfig(rank=8, density=0.1, alpha=8.0, seed=3)
OPTIMIZER = OptimizerConfig(name="adamw", lr=1e-2, weight_decay=0.05, grad_clipping=1.0)


MODEL = ModelConfig(
    name="tiny",
    vocab_size=250,  # padded to 256: the padding takes part in everything and must not matter
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.1,
)

# What four tensor-parallel ranks can share: 4 key/value heads, 8 windows; the width is padded, 172 to 192.
SHARED = dataclasses.replace(MODEL, vocab_size=251, intermediate_size=172, num_key_value_heads=4)
SHARED_METHODS = {
    "fan_in": dataclasses.replace(METHOD, density=0.125),
    "block": dataclasses.replace(METHOD, density=0.125, support="block", block_size=4),
    "low_rank": dataclasses.replace(METHOD, method="low_rank", rank=32),
    "full": dataclasses.replace(METHOD, method="full"),
    "slope": dataclasses.replace(METHOD, method="slope", mask_change_freq=3),
}

SMALL = dataclasses.replace(MODEL, num_hidden_layers=1)  # where one block shows as much as two


def tiny_factory(
    method: MethodConfig = METHOD,
    model: ModelConfig = SMALL,
    tp: TensorParallel | None = None,
    decoder: Callable[..., Any] = Llama,
    path: Path = "composed",
    **options: Any,
) -> ModelFactory:
    def make(*, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        made: nn.Module = decoder(model, method, device=device, dtype=dtype, **options)
        if tp is not None:
            check_tensor_parallel(decoder(model, method), tp.size)
            parallelize(made, tp)
        for module in made.modules():
            if isinstance(module, SLTrain):
                module.path = path
        return made

    return make


@functools.cache
def arranged(tensor_parallel: int, replicate: int = 1) -> Mesh:
    """The ranks of this process group on other axes; made once, for every mesh brings threads of its own."""
    return initialise(device="cpu", tensor_parallel=tensor_parallel, replicate=replicate)


def batch(update: int) -> tuple[Tensor, Tensor]:
    """The global batch of an update: arithmetic sequences, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1000 + update)
    start = torch.randint(MODEL.vocab_size, (GLOBAL_BATCH, 1), generator=generator)
    stride = torch.randint(1, 4, (GLOBAL_BATCH, 1), generator=generator)
    tokens = (start + stride * torch.arange(LENGTH + 1)) % MODEL.vocab_size
    labels = tokens[:, 1:].clone()
    for row in range(GLOBAL_BATCH):  # row 0 loses 1 label, row 7 loses 15
        labels[row, : 1 + 2 * row] = -100
    return tokens[:, :-1].contiguous(), labels


def micro_batches(mesh: Mesh, update: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's slices of the global batch; their union is the same for every number of ranks."""
    tokens, labels = batch(update)
    size = GLOBAL_BATCH // ACCUMULATION // mesh.dp_size
    starts = [(m * mesh.dp_size + mesh.dp_rank) * size for m in range(ACCUMULATION)]
    return [(tokens[s : s + size], labels[s : s + size]) for s in starts]


class Hooked:
    """An engine whose loss passes through a hook before backward: how faults are planted."""

    def __init__(self, engine: Engine, hook: Callable[[Tensor], Tensor]) -> None:
        self.engine, self.hook = engine, hook
        self.mesh, self.module, self.step = engine.mesh, engine.module, engine.step
        self.begin_update = engine.begin_update

    def accumulate(self, loss: Tensor, *, last: bool) -> None:
        self.engine.accumulate(self.hook(loss), last=last)


def update(
    engine: Engine, number: int, lr: float, loss_hook: Callable[[Tensor], Tensor] | None = None
) -> tuple[float, float]:
    """One update by the real loop's function; returns (mean token loss over all ranks, gradient norm)."""
    parts = micro_batches(engine.mesh, number)
    run: Any = SimpleNamespace(
        engine=engine if loss_hook is None else Hooked(engine, loss_hook),
        mesh=engine.mesh,
        config=SimpleNamespace(loss_average="tokens"),
    )
    batches = [{"tokens": tokens, "labels": labels} for tokens, labels in parts]
    loss, tokens_seen, norm = updates.update(run, batches, lr)
    updates.choose_masks(engine, engine.module.method, number + 1)
    assert tokens_seen == int((batch(number)[1] >= 0).sum())
    return loss, norm


def config(kind: str, dp_size: int, **changes: Any) -> EngineConfig:
    """Engine configuration of "fsdp" or "zero0" ... "zero3"."""
    stage = int(kind[4:]) if kind.startswith("zero") else 0
    values: dict[str, Any] = {
        "engine": "zero" if kind.startswith("zero") else kind,
        "stage": stage,
        "batch_size": GLOBAL_BATCH // ACCUMULATION // dp_size,
        "gradient_accumulation": ACCUMULATION,
    }
    return EngineConfig(**(values | changes))


def build(
    mesh: Mesh,
    kind: str,
    optimizer: OptimizerConfig = OPTIMIZER,
    method: MethodConfig = METHOD,
    model: ModelConfig = SMALL,
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> Engine:
    """A fresh engine over the tiny model, cut over the tensor-parallel ranks of the mesh.

    options: of `tiny_factory`; changes: of `config`.
    """
    changes = {"tensor_parallel": mesh.tp_size, "replicate": mesh.replicate_size} | changes
    engine_config = config(kind, mesh.dp_size, **changes)
    tp = tensor_parallel(mesh, engine_config)
    factory = tiny_factory(method, model, tp, **(options or {}))
    return build_engine(factory, mesh, engine_config, OptimizerFactory(optimizer), method.seed)


def train(engine: Engine, first: int, count: int, lr: float = 1e-2) -> list[tuple[float, float]]:
    """Updates [first, first + count): their losses and gradient norms."""
    return [update(engine, number, lr) for number in range(first, first + count)]
