"""A model for inference from any weights that `open_pretrained` knows, and the dense W of its linears.

pretrained = open_pretrained("runs/a", "--model")
model = load_model(pretrained)                     # B, A, values and offsets as they are
model = load_model(pretrained, merged=True)        # every linear one dense W: method "full"
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sltrain_dist.model.llama import Llama
from sltrain_dist.ops.composed import compose_weight, effective_scale
from sltrain_dist.params.linears import LowRank, ParameterizedLinear, SLTrain
from sltrain_dist.train.pretrained import Pretrained, open_pretrained

__all__ = ["Pretrained", "dense_tensors", "dense_weight", "load_model", "open_pretrained"]

_MADE_OF = ("b", "a", "scaling", "values", "offsets")  # what W replaces when a linear is merged


def load_model(
    pretrained: Pretrained,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    merged: bool = False,
) -> Llama:
    """The model in eval mode, without gradients, filled tensor by tensor.

    Args:
        device, dtype: of the parameters; offsets keep their integers.
        merged: make every linear a dense W (method "full"), composed in float32.

    Raises:
        UserError: a tensor cannot be read.
    """
    method = pretrained.method
    if merged:
        method = dataclasses.replace(method, method="full")
    model = Llama(pretrained.model, method, device="meta", dtype=dtype)
    tensors = dense_tensors(pretrained) if merged else _tensors(pretrained)
    for name, tensor in tensors:
        kept = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        owner, _, leaf = name.rpartition(".")
        # Assigned, not copied into an empty one: an imported support has its own number of values.
        setattr(model.get_submodule(owner), leaf, nn.Parameter(kept, requires_grad=False))
    model.tie_weights()
    return model.eval()


def linears(pretrained: Pretrained) -> dict[str, ParameterizedLinear]:
    """The parameterized linears of the model by name, on the meta device."""
    model = Llama(pretrained.model, pretrained.method, device="meta")
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ParameterizedLinear)
    }


@torch.no_grad()
def dense_weight(pretrained: Pretrained, name: str, linear: ParameterizedLinear) -> Tensor:
    """W of one linear, physical [out, in], float32: weight, s * B A, or s * B A + S."""

    def read(part: str) -> Tensor:
        tensor = pretrained.tensor(f"{name}.{part}")
        return tensor.float() if tensor.is_floating_point() else tensor

    if not isinstance(linear, LowRank):
        return read("weight")
    shape, scale = (linear.shape.out, linear.shape.in_), linear.method.scale
    scaling = None if linear.scaling is None else read("scaling")
    if isinstance(linear, SLTrain):
        return compose_weight(
            read("b"), read("a"), read("values"), read("offsets"), scaling, scale, linear.support.tiles, shape
        )  # fmt: skip
    return (read("b") @ read("a")) * effective_scale(scaling, scale, torch.float32)


def dense_tensors(pretrained: Pretrained) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the same model with dense linears: (name, physical tensor), W in float32."""
    modules = linears(pretrained)
    for name in pretrained.names():
        owner, _, leaf = name.rpartition(".")
        if owner not in modules or leaf not in _MADE_OF:
            yield name, pretrained.tensor(name)
        elif leaf == "b":
            yield f"{owner}.weight", dense_weight(pretrained, owner, modules[owner])


def _tensors(pretrained: Pretrained) -> Iterator[tuple[str, Tensor]]:
    return ((name, pretrained.tensor(name)) for name in pretrained.names())
