"""A model for inference from any weights that `open_pretrained` knows, and those weights with dense linears.

pretrained = open_pretrained("runs/a", "--model")
model = load_model(pretrained)                     # B, A, values and offsets as they are
model = load_model(pretrained, merged=True)        # every linear one dense W: method "full"
"""

import dataclasses

import torch
from torch import Tensor, nn

from sltrain_dist.model.llama import Llama
from sltrain_dist.ops.composed import compose_weight, effective_scale
from sltrain_dist.ops.pruned import compose
from sltrain_dist.params.linears import LowRank, SLTrain
from sltrain_dist.params.parameterized import Dense, ParameterizedLinear
from sltrain_dist.params.slope import Slope
from sltrain_dist.train.parameter_names import blank_specs
from sltrain_dist.train.pretrained import Pretrained, open_pretrained

__all__ = ["Pretrained", "load_model", "merge", "open_pretrained", "parameterized"]


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
    source = merge(pretrained) if merged else pretrained
    model = Llama(source.model, source.method, device="meta", dtype=dtype)
    for name in source.names():
        tensor = source.tensor(name)
        kept = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        owner, _, leaf = name.rpartition(".")
        # Assigned, not copied into an empty one: an imported support has its own number of values.
        setattr(model.get_submodule(owner), leaf, nn.Parameter(kept, requires_grad=False))
    model.tie_weights()
    return model.eval()


def parameterized(pretrained: Pretrained) -> dict[str, ParameterizedLinear]:
    """The model's parameterized linears by name, on the meta device."""
    model = Llama(pretrained.model, pretrained.method, device="meta")
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ParameterizedLinear)
    }


def merge(pretrained: Pretrained) -> Pretrained:
    """The same model as method "full": each W [out, in] is composed, in float32, when it is read.

    One linear is in memory at a time; other parameters are read as they are stored.
    """
    if pretrained.method.method == "full":
        return pretrained
    modules = parameterized(pretrained)

    def read(name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        if owner in modules and leaf == "weight":
            return _dense_weight(pretrained, owner, modules[owner])
        return pretrained.read(name)

    method = dataclasses.replace(pretrained.method, method="full")
    shapes = {name: spec.shape for name, spec in blank_specs(pretrained.model, method).items()}
    return dataclasses.replace(
        pretrained, method=method, shapes=shapes, generated=True, support_hash=0, read=read
    )


@torch.no_grad()
def _dense_weight(pretrained: Pretrained, name: str, linear: ParameterizedLinear) -> Tensor:
    """W of one linear, as its method makes it; physical [out, in], float32."""

    def read(part: str) -> Tensor:
        tensor = pretrained.read(f"{name}.{part}")
        return tensor.float() if tensor.is_floating_point() else tensor

    if isinstance(linear, Dense):  # that slope leaves so
        return read("weight")
    if isinstance(linear, Slope):
        return compose(read("values"), read("offsets"), linear.pattern)
    assert isinstance(linear, LowRank)
    b, a, scale = read("b"), read("a"), linear.method.scale
    scaling = None if linear.scaling is None else read("scaling")
    if not isinstance(linear, SLTrain):
        return (b @ a).mul_(effective_scale(scaling, scale, b.dtype))
    shape, tiles = (linear.shape.out, linear.shape.in_), linear.support.tiles
    return compose_weight(b, a, read("values"), read("offsets"), scaling, scale, tiles, shape)
