"""What the parameters of a model are called and shaped, and its generated offsets, without the model's memory.

Names are those of `Llama.named_parameters`; shapes are global, physical unless said otherwise.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sltrain_dist.config import MethodConfig, ModelConfig
from sltrain_dist.model.llama import Llama
from sltrain_dist.params import ParameterSpec, collect_specs, partial_hash
from sltrain_dist.train.stored_tensors import StoredError


def blank_specs(model: ModelConfig, method: MethodConfig) -> dict[str, ParameterSpec]:
    """The spec of every parameter of the model, by name; nothing is allocated."""
    return collect_specs(Llama(model, method, device="meta"))


def whole_offsets(spec: ParameterSpec, seed: int, name: str) -> Tensor:
    """The offsets of one layer as our generator makes them."""
    count = torch.Size(spec.shape).numel()
    return spec.initial.flat(seed, name, 0, count).view(spec.shape)


def generated_hash(specs: dict[str, ParameterSpec], seed: int) -> int:
    """The hash of a model's generated support, one layer in memory at a time."""
    return stored_hash(specs, seed, lambda name: whole_offsets(specs[name], seed, name))


def stored_hash(specs: dict[str, ParameterSpec], seed: int, read: Callable[[str], Tensor]) -> int:
    """The hash of the support whose offsets ``read`` gives by name, one layer in memory at a time."""
    return sum(
        partial_hash(seed, name, 0, read(name))
        for name, spec in specs.items()
        if spec.kind == "indices"
    ) % (1 << 64)


def is_ignored(name: str) -> bool:
    """Whether a stored tensor is a buffer that old versions of transformers saved; it is recomputed here."""
    return name.endswith(".rotary_emb.inv_freq")


def logical_shape(name: str, shape: tuple[int, ...], model: ModelConfig) -> tuple[int, ...]:
    """The shape of a dense parameter without padding (vocabulary, width of the MLP)."""
    size = list(shape)
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        size[0] = model.vocab_size
    elif ".mlp.down_proj.weight" in name:
        size[1] = model.intermediate_size
    elif ".mlp.gate_proj." in name or ".mlp.up_proj." in name:
        size[0] = model.intermediate_size
    return tuple(size)


def check_names(
    wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], what: str
) -> None:
    """Compare names and shapes of tensors.

    Raises:
        StoredError: the first that is missing, left over, or of another shape than ``what`` says.
    """
    missing = [name for name in wanted if name not in found]
    over = [name for name in found if name not in wanted]
    for names, verdict in ((missing, "missing"), (over, "left over")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise StoredError(f"tensor {names[0]}{more} {verdict}, by {what}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise StoredError(f"tensor {name} is {list(found[name])}; by {what} {list(shape)}")
