"""The linear of an N:M pruned weight: of every M neighbouring inputs of a row, N have a value (SLoPe, arXiv 2405.16325).

    y = x W^T + bias        dx = dy (W * mask)        dvalues = dy^T x, at the kept positions alone

    values    [out, in N/M]          of the kept weights, group by group in ascending order of position
    offsets   [out, in N/M bits/8]   uint8: where in its group each value stands, ``bits`` a value, low bits first
    backward  [out, in N/M / 8]      uint8: the mask, a bit a value: what the second pruning keeps
                                     (a row begins with a byte of its own: bytes are rounded up)

The second pruning is N:M along the *outputs*, among the values that are there: so the transpose of W * mask has the
structure too that sparse tensor cores ask for. It is no derivative of the forward product, which is SLoPe's bargain.
W is built in a workspace for each product and forgotten; dW is formed in panels of rows and read at the kept positions.
A group is a tile of ops.tiles (1 x M with N entries), so the kernels that write and read supports serve here too.

Shapes: n tokens (all leading dimensions of x), out and in the features.
    FLOPs forward  2 n out in;  forward and backward  6 n out in: the products are dense ones here
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sltrain_dist.ops.pattern import Pattern, unpack
from sltrain_dist.ops.precision import compute_dtype, widened
from sltrain_dist.ops.support import add_support, gather_support
from sltrain_dist.ops.tiles import Tiles


def _row_panels(out_features: int, pattern: Pattern) -> list[slice]:
    """Rows that are worked on at a time."""
    rows = Tiles(1, pattern.group, 1).panel_rows(out_features)
    return [slice(at, min(at + rows, out_features)) for at in range(0, out_features, rows)]


def _tiled(values: Tensor, offsets: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Rows of values and packed offsets as ops.tiles has them: [rows, groups, N, 1] and [rows, groups, N]."""
    positions = unpack(offsets, pattern.bits, values.shape[-1]).unflatten(-1, (-1, pattern.kept))
    return values.unflatten(-1, (-1, pattern.kept, 1)), positions


def compose(
    values: Tensor, offsets: Tensor, pattern: Pattern, backward: Tensor | None = None
) -> Tensor:
    """W [out, in], or W * mask where ``backward`` is given, as a dense matrix in the dtype of ``values``."""
    w = values.new_zeros(values.shape[0], pattern.in_features(values.shape[1]))
    for rows in _row_panels(values.shape[0], pattern):
        part = values[rows]
        if backward is not None:
            part = part.masked_fill(unpack(backward[rows], 1, values.shape[1]) == 0, 0)
        add_support(w[rows], *_tiled(part, offsets[rows], pattern), 1, pattern.group, 1)
    return w


@torch.library.custom_op("sltrain_dist::pruned_linear", mutates_args=())
def pruned_linear(
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    backward: Tensor,
    bias: Tensor | None,
    kept: int,
    group: int,
) -> Tensor:
    """y = x W^T + bias with W built in a transient workspace.

    Args:
        x: [..., in].
        values, offsets, backward: see the top of this file; ``backward`` is for the gradient of x alone.
        bias: [out] or None.
        kept, group: N and M.

    Returns:
        y [..., out] in the dtype of x (float32, float64 or bfloat16; values and bias share it).
    """
    wide_x, values, bias = widened(compute_dtype(x), x, values, bias)
    w = compose(values, offsets, Pattern(kept, group))
    return torch.nn.functional.linear(wide_x, w, bias).to(x.dtype)


@pruned_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    backward: Tensor,
    bias: Tensor | None,
    kept: int,
    group: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


@torch.library.custom_op("sltrain_dist::pruned_linear_backward", mutates_args=())
def pruned_linear_backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    backward: Tensor,
    kept: int,
    group: int,
    needs: list[bool],
) -> list[Tensor]:
    """[dx, dvalues] of ``pruned_linear``, empty where ``needs``, two flags, does not ask for them."""
    pattern, narrow = Pattern(kept, group), x.dtype
    dy, x, values = widened(compute_dtype(x), dy, x, values)
    dy2, x2 = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dx = x.new_empty(0)
    if needs[0]:
        w = compose(values, offsets, pattern, backward)
        dx = (dy2 @ w).view(x.shape)
        del w
    dvalues = torch.zeros_like(values) if needs[1] else x.new_empty(0)
    for rows in _row_panels(values.shape[0], pattern) if needs[1] else ():
        dw = dy2[:, rows].t() @ x2
        gather_support(dw, 0, *_tiled(dvalues[rows], offsets[rows], pattern), 1, group, 1)
    return [dx.to(narrow), dvalues.to(narrow)]


@pruned_linear_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    backward: Tensor,
    kept: int,
    group: int,
    needs: list[bool],
) -> list[Tensor]:
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for tensor, need in zip((x, values), needs, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Nothing but the inputs: a saved view or cast of a parameter would outlive its gathered memory."""
    x, values, offsets, backward, bias, kept, group = inputs
    ctx.save_for_backward(x, values, offsets, backward)
    ctx.has_bias, ctx.constants = bias is not None, (kept, group)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    needs = [wanted[0], wanted[1]]
    operator = torch.ops.sltrain_dist.pruned_linear_backward
    grads = operator(dy, *ctx.saved_tensors, *ctx.constants, needs)
    dx, dvalues = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    dbias = dy.sum(dim=tuple(range(dy.dim() - 1))) if ctx.has_bias and wanted[4] else None
    return dx, dvalues, None, None, dbias, None, None


pruned_linear.register_autograd(_backward, setup_context=_save)


def workspace_bytes(
    out_features: int, in_features: int, pattern: Pattern, element_size: int
) -> dict[str, int]:
    """Peak transient bytes of the reference implementation beside its inputs and outputs.

    Returns:
        {"forward": W, and of one panel of rows the positions with their int64 index;
        "backward": the larger of that with the masked values and one panel of dW}.
    """
    panel = min(Tiles(1, pattern.group, 1).panel_rows(out_features), out_features)
    entries = panel * pattern.width(in_features)
    forward = out_features * in_features * element_size + entries * (2 + 8)
    masked = entries * (element_size + 2)
    gathered = panel * in_features * element_size + entries * (2 + 8 + element_size)
    return {"forward": forward, "backward": max(forward + masked, gathered)}


@register_flop_formula(torch.ops.sltrain_dist.pruned_linear)
def _forward_flops(x: Any, values: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    return int(2 * _tokens(x) * values[0] * x[-1])


@register_flop_formula(torch.ops.sltrain_dist.pruned_linear_backward)
def _backward_flops(dy: Any, x: Any, *rest: Any, **_: Any) -> int:
    return int(4 * _tokens(x) * dy[-1] * x[-1])


def _tokens(shape: Any) -> int:
    tokens = 1
    for size in shape[:-1]:
        tokens *= size
    return tokens
