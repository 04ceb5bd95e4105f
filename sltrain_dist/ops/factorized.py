"""The factorized path of the SLTrain linear: the factors and S are applied one after the other.

    h = x A^T,  y = s * h B^T + x S^T + bias,   s = scale, or tanh(scaling) where scaling is trained
    dh = s * dy B,  dx = dh A + dy S,  dA = dh^T x,  dB = s * dy^T h,  dvalues = (dy^T x) at the support

No matrix of the size of W exists. For dB backward needs h: it computes h again, or the caller has it
kept, [n, r] a linear, for a seventh less work in matrix products.

Shapes: n tokens (all leading dimensions of x), r rank, out and in the features, d density of S.
    FLOPs forward  2 n r (out + in) + 2 n d out in
          both     6 n r (out + in) + 6 n d out in, and 2 n r in where h is computed again
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sltrain_dist.ops import block_triton, kernels
from sltrain_dist.ops.composed import (
    effective_scale,
    empty_gradients,
    gradients,
    save_inputs,
)
from sltrain_dist.ops.precision import compute_dtype, widened
from sltrain_dist.ops.sparse import sparse_backward, sparse_forward
from sltrain_dist.ops.tiles import Tiles, matrix_shape


def factorized_reference(
    x: Tensor,
    b: Tensor | None,
    a: Tensor | None,
    values: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    scaling: Tensor | None,
    scale: float,
    tile_out: int,
    tile_in: int,
    block: int,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """y = s * (x A^T) B^T + x S^T + bias, on every device. Arguments as ``composed_linear``, and

    keep_hidden: return h = x A^T too, so that backward need not compute it again.

    Returns:
        y [..., out], and h [n, r] or an empty tensor; in the dtype of x.
    """
    out_features, in_features = matrix_shape(values, Tiles(tile_out, tile_in, block))
    dtype = compute_dtype(x)
    wide_x, b, a, values, bias = widened(dtype, x, b, a, values, bias)
    x2 = wide_x.reshape(-1, in_features)
    y = x2.new_empty(x2.shape[0], out_features)
    hidden = x.new_empty(0)
    if b is None or a is None:
        y.zero_()
    else:
        h = x2 @ a.t()
        if keep_hidden:
            hidden = h.to(x.dtype)
        if scaling is not None:
            h = h * effective_scale(scaling, scale, dtype)
        torch.addmm(y, h, b.t(), beta=0, alpha=scale if scaling is None else 1.0, out=y)
    if bias is not None:
        y.add_(bias)
    sparse_forward(x2, y, values, offsets, tile_out, tile_in, block)
    narrow: Tensor = y.to(x.dtype)
    return narrow.view(*x.shape[:-1], out_features), hidden


factorized_linear: Any = torch.library.custom_op(
    "sltrain_dist::factorized_linear", factorized_reference, mutates_args=()
)


def _fake(
    x: Tensor,
    b: Tensor | None,
    a: Tensor | None,
    values: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    scaling: Tensor | None,
    scale: float,
    tile_out: int,
    tile_in: int,
    block: int,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    out_features, _ = matrix_shape(values, Tiles(tile_out, tile_in, block))
    y = x.new_empty((*x.shape[:-1], out_features))
    if a is None or not keep_hidden:
        return y, x.new_empty(0)
    return y, x.new_empty((y.numel() // out_features, a.shape[0]))


factorized_linear.register_fake(_fake)


def factorized_backward_reference(
    dy: Tensor,
    x: Tensor,
    b: Tensor | None,
    a: Tensor | None,
    values: Tensor,
    offsets: Tensor,
    hidden: Tensor | None,
    scaling: Tensor | None,
    scale: float,
    tile_out: int,
    tile_in: int,
    block: int,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients [dx, dB, dA, dvalues, dscaling] of ``factorized_linear``; empty where not needed.

    hidden: h [n, r] as forward returned it, or None: then it is computed again.
    """
    out_features, in_features = matrix_shape(values, Tiles(tile_out, tile_in, block))
    narrow, shape = x.dtype, x.shape
    dy, x, b, a, values = widened(compute_dtype(x), dy, x, b, a, values)
    need_x, need_b, need_a, need_values, need_scaling = needs
    dy2, x2 = dy.reshape(-1, out_features), x.reshape(-1, in_features)
    wide = torch.promote_types(x.dtype, torch.float32)
    dx = x2.new_zeros(x2.shape) if need_x and (b is None or a is None) else None
    db, da, ds = (x.new_empty(0) for _ in range(3))
    if b is not None and a is not None:
        s = effective_scale(scaling, scale, x.dtype)
        if need_b or need_scaling:
            db = dy2.t() @ (x2 @ a.t() if hidden is None else hidden.to(x.dtype))
            if need_scaling:
                assert scaling is not None
                slope = 1 - torch.tanh(scaling.to(wide)) ** 2
                ds = ((db.to(wide) * b.to(wide)).sum() * slope).to(scaling.dtype)
            db = db.mul_(s) if need_b else x.new_empty(0)
        if need_x or need_a:
            dh = (dy2 @ b).mul_(s)
            if need_x:
                dx = dh @ a
            if need_a:
                da = dh.t() @ x2
            del dh
    dvalues = sparse_backward(dy2, x2, dx, values, offsets, tile_out, tile_in, block, need_values)
    dx = x.new_empty(0) if dx is None else dx.view(shape)
    ds = ds if need_scaling else ds.to(narrow)
    return [*(grad.to(narrow) for grad in (dx, db, da, dvalues)), ds]


factorized_linear_backward: Any = torch.library.custom_op(
    "sltrain_dist::factorized_linear_backward", factorized_backward_reference, mutates_args=()
)


def _fake_gradients(
    dy: Tensor, x: Tensor, b: Any, a: Any, values: Tensor, *rest: Any
) -> list[Tensor]:
    _, _, scaling, *_, needs = rest
    return empty_gradients((x, b, a, values, scaling), needs)


factorized_linear_backward.register_fake(_fake_gradients)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden = output[1]
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)
    save_inputs(ctx, inputs[:-1], output, (hidden if hidden.dim() == 2 else None,))


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:  # not materialized, for the sake of the one of h that nobody needs
        return (None,) * 12
    return *gradients(ctx, dy, torch.ops.sltrain_dist.factorized_linear_backward), None


factorized_linear.register_autograd(_backward, setup_context=_save_inputs)
if not kernels.reference_only():
    block_triton.register(
        factorized_linear,
        factorized_linear_backward,
        factorized_reference,
        factorized_backward_reference,
    )


@register_flop_formula(torch.ops.sltrain_dist.factorized_linear)
def _forward_flops(
    x: Any, b: Any, a: Any, values: Any, *rest: Any, out_shape: Any = None, **_: Any
) -> int:
    tokens = torch.Size(x[:-1]).numel()
    rank = b[1] if b is not None else 0
    return int(2 * tokens * (rank * (x[-1] + out_shape[0][-1]) + torch.Size(values).numel()))


@register_flop_formula(torch.ops.sltrain_dist.factorized_linear_backward)
def _backward_flops(
    dy: Any, x: Any, b: Any, a: Any, values: Any, offsets: Any, hidden: Any, *rest: Any, **_: Any
) -> int:
    tokens = torch.Size(x[:-1]).numel()
    rank = b[1] if b is not None else 0
    products = (2 if hidden is not None else 3) * x[-1] + 2 * dy[-1]
    return int(2 * tokens * (rank * products + 2 * torch.Size(values).numel()))


def workspace_bytes(
    out_features: int, in_features: int, entries: int, rank: int, tokens: int, threads: int
) -> dict[str, int]:
    """Peak transient bytes of the CPU kernels beside inputs and outputs, an upper bound.

    Threads that work on chunks of their own sum dB, dA and dvalues in copies of their own; where
    those would exceed 256 MiB all threads share one (csrc/cpu/factorized.cpp, Plan). On a GPU the
    products are torch's and the workspace is h and dh.

    Args:
        entries: elements of S. tokens: n of a micro-batch. threads: of the process.
    """
    factors = 4 * rank * (out_features + in_features)
    copies = max(1, min((256 << 20) // max(1, factors + 4 * entries), 8))
    shared = threads > copies
    chunk = 4096 if shared else max(128, min(factors // 8192, 1024))
    workers = 1 if shared else min(threads, -(-tokens // chunk) or 1)
    held = min(chunk + 16, tokens) * (2 * rank + out_features + in_features) * 4
    packed = 64 * (out_features + in_features) * 4 * min(threads, 1 if workers > 1 else threads)
    lists = entries * 16 + 16 * (out_features + in_features + 2)
    sums = 4 * entries * (min(threads, 8) if workers == 1 else 1)
    forward = lists + workers * (held + packed)
    return {"forward": forward, "backward": 2 * lists + workers * (factors + sums + held + packed)}
