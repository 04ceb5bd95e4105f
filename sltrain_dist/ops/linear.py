"""The SLTrain linear, y = x (s * B A + S)^T + bias, by either of two equal paths.

``composed`` builds W for one dense product and wins where dense products are cheap and the sparse
ones are not (GPUs with unstructured supports). ``factorized`` never forms W and wins wherever S x is
cheap (CPUs; GPUs with block supports). Which one a layer takes is decided when the model is built
(params.paths), never in the middle of a step.
"""

from typing import Literal

import torch
from torch import Tensor

from sltrain_dist.ops.composed import composed_linear
from sltrain_dist.ops.factorized import factorized_linear
from sltrain_dist.ops.tiles import Tiles, matrix_shape

Path = Literal["composed", "factorized"]
PATHS: tuple[Path, ...] = ("composed", "factorized")


def sltrain_linear(
    x: Tensor,
    factors: tuple[Tensor, Tensor] | None,
    values: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    scaling: Tensor | None,
    scale: float,
    tiles: Tiles,
    path: Path = "composed",
    keep_hidden: bool | None = None,
) -> Tensor:
    """The operator of ``path`` with the factors (B, A) and the tiles as one argument each.

    Args:
        x: [..., in]; factors: B [out, r] and A [r, in], or None for y = x S^T + bias.
        keep_hidden: of the factorized path: keep h = x A^T [n, r] for backward instead of computing it
            again; None: on a CPU, where time is scarcer than memory.
        values, offsets: see ops.tiles. bias: [out]. scaling: [1], s = tanh(scaling), or None: s = scale.

    Returns:
        y [..., out] in the dtype of x.

    Raises:
        ValueError: features of x and of the support differ.
        TypeError: dtypes of x and values differ, or offsets are not integers.
    """
    check_inputs(x, values, offsets, tiles)
    b, a = factors or (None, None)
    sizes = (tiles.tile_out, tiles.tile_in, tiles.block)
    arguments = (x, b, a, values, offsets, bias, scaling, scale, *sizes)
    y: Tensor
    if path == "composed":
        y = composed_linear(*arguments)
    else:
        keep = keeps_hidden(x, keep_hidden) and torch.is_grad_enabled()
        y, _ = factorized_linear(*arguments, keep)
    return y


def keeps_hidden(x: Tensor, keep_hidden: bool | None) -> bool:
    """Whether the factorized path keeps h = x A^T for backward; see `sltrain_linear`."""
    return x.device.type == "cpu" if keep_hidden is None else keep_hidden


def check_inputs(x: Tensor, values: Tensor, offsets: Tensor, tiles: Tiles) -> None:
    """Refuse what no path can compute.

    Raises:
        ValueError: features of x and of the support differ.
        TypeError: dtypes of x and values differ, or offsets are not integers.
    """
    _, in_features = matrix_shape(values, tiles)
    if x.shape[-1] != in_features:
        raise ValueError(f"x has {x.shape[-1]} features, the support is for {in_features}")
    if x.dtype != values.dtype:
        raise TypeError(f"x is {x.dtype}, values are {values.dtype}: they must agree")
    if offsets.dtype not in (torch.uint8, torch.int32, torch.int64):
        raise TypeError(f"offsets are {offsets.dtype}; uint8, int32 or int64 is expected")
