"""Bytes that operators use inside themselves, by name of the operator, from the arguments of a call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sltrain_dist.ops import composed, cross_entropy, factorized, pruned
from sltrain_dist.ops.pattern import Pattern
from sltrain_dist.ops.precision import compute_dtype
from sltrain_dist.ops.tiles import Tiles, matrix_shape


def workspace(func: Any, args: tuple[Any, ...], device: str) -> int:
    """Transient bytes of a call of ``func`` beside its arguments and outputs; 0 for operators that have none that matters.

    device: "cpu" or "cuda", where the call is to run.
    """
    rule = _RULES.get(func._schema.name)
    return rule(args, device) if rule is not None else 0


def _composed(args: tuple[Any, ...], device: str, part: str) -> int:
    x, b, _, values, offsets = args[:5]
    tile_out, tile_in, block = args[8:11]
    tiles = Tiles(tile_out, tile_in, block)
    out, in_ = matrix_shape(values, tiles)
    rank = b.shape[1] if b is not None else 0
    element = _element(x, device)
    declared: dict[str, int] = composed.workspace_bytes(
        out, in_, offsets.numel(), tiles, element, rank
    )
    return declared[part] + _widened(args, out, element)


def _composed_backward(args: tuple[Any, ...], device: str) -> int:
    _, x, b, a, values, offsets, scaling, *rest = args
    return _composed((x, b, a, values, offsets, None, scaling, *rest), device, "backward")


def _factorized(args: tuple[Any, ...], device: str, part: str) -> int:
    x, b, _, values = args[:4]
    out, in_ = matrix_shape(values, Tiles(*args[8:11]))
    rank = b.shape[1] if b is not None else 0
    tokens = int(x.numel()) // in_
    if device == "cuda":  # the products are torch's: h, and in backward dh beside it
        return int(tokens * rank * x.element_size()) * (1 if part == "forward" else 2)
    declared: dict[str, int] = factorized.workspace_bytes(
        out, in_, values.numel(), rank, tokens, torch.get_num_threads()
    )
    return declared[part]


def _factorized_backward(args: tuple[Any, ...], device: str) -> int:
    _, x, b, a, values, offsets, _, scaling, *rest = args
    return _factorized((x, b, a, values, offsets, None, scaling, *rest), device, "backward")


def _pruned(args: tuple[Any, ...], device: str, part: str) -> int:
    x, values, _, _, _, *sizes = args
    pattern = Pattern(*sizes)
    out, in_ = values.shape[0], pattern.in_features(values.shape[1])
    element = _element(x, device)
    declared: dict[str, int] = pruned.workspace_bytes(out, in_, pattern, element)
    return declared[part] + _widened(args, out, element)


def _pruned_backward(args: tuple[Any, ...], device: str) -> int:
    _, x, values, offsets, backward, kept, group, _ = args
    return _pruned((x, values, offsets, backward, None, kept, group), device, "backward")


def _loss(args: tuple[Any, ...], device: str) -> int:
    """torch's chunked loss: what it declares to allocate, without the two gradients that it returns."""
    hidden, weight = args[:2]
    (tokens, width), rows = hidden.shape, weight.shape[0]
    declared = cross_entropy.workspace_bytes(tokens, width, rows, hidden.dtype, device)
    return declared - int(weight.numel() + hidden.numel()) * 4


def _element(x: Tensor, device: str) -> int:
    """Bytes of an element as products are computed there."""
    return x.element_size() if device == "cuda" else compute_dtype(x).itemsize


def _widened(args: tuple[Any, ...], out: int, element: int) -> int:
    """Wider copies of the inputs and of the result, where products are computed in another format."""
    x, *others = (t for t in args[:6] if isinstance(t, Tensor) and t.is_floating_point())
    if element == x.element_size():
        return 0
    elements = x.numel() + x.numel() // x.shape[-1] * out + sum(t.numel() for t in others)
    return elements * element


_RULES: dict[str, Callable[[tuple[Any, ...], str], int]] = {
    "sltrain_dist::composed_linear": lambda args, device: _composed(args, device, "forward"),
    "sltrain_dist::composed_linear_backward": _composed_backward,
    "sltrain_dist::factorized_linear": lambda args, device: _factorized(args, device, "forward"),
    "sltrain_dist::factorized_linear_backward": _factorized_backward,
    "sltrain_dist::pruned_linear": lambda args, device: _pruned(args, device, "forward"),
    "sltrain_dist::pruned_linear_backward": _pruned_backward,
    "torch_nn::_linear_cross_entropy_batch_chunked": _loss,
}
