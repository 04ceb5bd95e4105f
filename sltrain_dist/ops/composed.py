"""The composed path of the SLTrain linear: build W, one dense GEMM, and forget W again.

    y = x W^T + bias,   W = s * B A + S,   s = scale, or tanh(scaling) where scaling is trained

(SLTrain, arXiv 2406.02214, equation 2.) Only the inputs themselves are saved for backward: W is
built in a workspace for the forward product, rebuilt for dx, released, and dW is formed in panels
of rows, each read at the support and multiplied into dB and dA before the next one is made.

Shapes: n tokens (all leading dimensions of x), r rank, out and in the features.
    FLOPs forward  2 n out in + 2 r out in;  forward and backward  6 n out in + 8 r out in
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sltrain_dist.ops.precision import compute_dtype, widened
from sltrain_dist.ops.support import add_support, gather_support
from sltrain_dist.ops.tiles import Tiles, matrix_shape


def effective_scale(scaling: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor | float:
    """s = scale, or tanh(scaling) in ``dtype``, computed in at least fp32."""
    if scaling is None:
        return scale
    return torch.tanh(scaling.to(torch.promote_types(dtype, torch.float32))).to(dtype)


def compose_weight(
    b: Tensor | None,
    a: Tensor | None,
    values: Tensor,
    offsets: Tensor,
    scaling: Tensor | None,
    scale: float,
    tiles: Tiles,
    shape: tuple[int, int],
) -> Tensor:
    """W = s * B A + S as a dense matrix [out, in] in the dtype of ``values``; no other workspace."""
    w = values.new_empty(shape)
    if b is None or a is None:
        w.zero_()
    elif scaling is None:
        torch.addmm(w, b, a, beta=0, alpha=scale, out=w)
    else:
        torch.mm(b, a, out=w)
        w.mul_(effective_scale(scaling, scale, w.dtype))
    add_support(w, values, offsets, tiles.tile_out, tiles.tile_in, tiles.block)
    return w


@torch.library.custom_op("sltrain_dist::composed_linear", mutates_args=())
def composed_linear(
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
) -> Tensor:
    """y = x W^T + bias with W = s * B A + S built in a transient workspace.

    Args:
        x: [..., in].
        b: [out, r], or None with a: then W = S.
        a: [r, in].
        values: [out/tile_out, in/tile_in, k, block*block], or [k] where the tile is the matrix.
        offsets: [out/tile_out, in/tile_in, k] or [k]; uint8, int32 or int64.
        bias: [out] or None.
        scaling: [1] or None; s = tanh(scaling) where given, else ``scale``.
        scale: alpha / r.
        tile_out, tile_in, block: see ops.tiles.

    Returns:
        y [..., out] in the dtype of x (float32, float64 or bfloat16; all floating inputs share it).
    """
    tiles = Tiles(tile_out, tile_in, block)
    shape = matrix_shape(values, tiles)
    dtype = compute_dtype(x)
    wide_x, b, a, values, bias = widened(dtype, x, b, a, values, bias)
    w = compose_weight(b, a, values, offsets, scaling, scale, tiles, shape)
    return torch.nn.functional.linear(wide_x, w, bias).to(x.dtype)


@composed_linear.register_fake
def _(
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
) -> Tensor:
    out_features, _ = matrix_shape(values, Tiles(tile_out, tile_in, block))
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op("sltrain_dist::composed_linear_backward", mutates_args=())
def composed_linear_backward(
    dy: Tensor,
    x: Tensor,
    b: Tensor | None,
    a: Tensor | None,
    values: Tensor,
    offsets: Tensor,
    scaling: Tensor | None,
    scale: float,
    tile_out: int,
    tile_in: int,
    block: int,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients [dx, dB, dA, dvalues, dscaling] of ``composed_linear``; empty where not needed.

    ``needs`` holds five flags in that order. dA and dscaling are summed over panels in fp32
    (fp64 for fp64 inputs).
    """
    tiles = Tiles(tile_out, tile_in, block)
    shape = matrix_shape(values, tiles)
    narrow = x.dtype
    dy, x, b, a, values = widened(compute_dtype(x), dy, x, b, a, values)
    need_x, need_b, need_a, need_values, need_scaling = needs
    dy2, x2 = dy.reshape(-1, shape[0]), x.reshape(-1, shape[1])
    dx = x.new_empty(0)  # one empty tensor each: outputs of an operator must not alias
    if need_x:
        w = compose_weight(b, a, values, offsets, scaling, scale, tiles, shape)
        dx = (dy2 @ w).view(x.shape)
        del w
    low_rank = b is not None and a is not None
    db = torch.empty_like(b) if need_b and b is not None else x.new_empty(0)
    wide = torch.promote_types(x.dtype, torch.float32)
    da = torch.zeros_like(a, dtype=wide) if need_a and a is not None else x.new_empty(0)
    dvalues = torch.zeros_like(values) if need_values else x.new_empty(0)
    ds = x.new_zeros(1, dtype=wide) if need_scaling else x.new_empty(0)
    if need_b or need_a or need_values or need_scaling:
        s = effective_scale(scaling, scale, x.dtype)
        rows = tiles.panel_rows(shape[0])
        for start in range(0, shape[0], rows):
            dw = dy2[:, start : start + rows].t() @ x2
            if need_values:
                gather_support(dw, start, dvalues, offsets, tile_out, tile_in, block)
            if low_rank:
                assert b is not None
                assert a is not None
                b_panel = b[start : start + rows]
                if need_b or need_scaling:
                    dw_a = dw @ a.t()
                    if need_b:
                        torch.mul(dw_a, s, out=db[start : start + rows])
                    if need_scaling:
                        ds += (dw_a.to(wide) * b_panel.to(wide)).sum()
                if need_a and dw.dtype == wide:
                    torch.addmm(da, b_panel.t(), dw, out=da)
                elif need_a:
                    da += b_panel.t() @ dw
        if need_a and low_rank:
            da = da.mul_(s).to(x.dtype)
        if need_scaling:
            assert scaling is not None
            ds = (ds * (1 - torch.tanh(scaling.to(wide)) ** 2)).to(scaling.dtype)
    ds = ds if need_scaling else ds.to(narrow)
    return [*(grad.to(narrow) for grad in (dx, db, da, dvalues)), ds]


@composed_linear_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    b: Tensor | None,
    a: Tensor | None,
    values: Tensor,
    offsets: Tensor,
    scaling: Tensor | None,
    scale: float,
    tile_out: int,
    tile_in: int,
    block: int,
    needs: list[bool],
) -> list[Tensor]:
    return empty_gradients((x, b, a, values, scaling), needs)


def empty_gradients(inputs: tuple[Tensor | None, ...], needs: list[bool]) -> list[Tensor]:
    """What a backward operator returns for (x, b, a, values, scaling), without the numbers."""
    (x, *_) = inputs
    assert x is not None
    return [
        x.new_empty(tensor.shape, dtype=tensor.dtype)
        if need and tensor is not None
        else x.new_empty(0)
        for need, tensor in zip(needs, inputs, strict=True)
    ]


def save_inputs(
    ctx: Any, inputs: tuple[Any, ...], output: Any, kept: tuple[Tensor | None, ...] = ()
) -> None:
    """Save for backward nothing but the inputs (no scaled copy of A, no view of a parameter) and ``kept``."""
    x, b, a, values, offsets, bias, scaling, scale, tile_out, tile_in, block = inputs
    ctx.save_for_backward(x, b, a, values, offsets, *kept, scaling)
    ctx.has_bias = bias is not None
    ctx.constants = (scale, tile_out, tile_in, block)


def gradients(ctx: Any, dy: Tensor, operator: Any) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments of a linear operator whose backward is ``operator``."""
    wanted = ctx.needs_input_grad
    needs = [wanted[0], wanted[1], wanted[2], wanted[3], wanted[6]]
    grads = operator(dy, *ctx.saved_tensors, *ctx.constants, needs)
    dx, db, da, dvalues, ds = (
        grad if need else None for grad, need in zip(grads, needs, strict=True)
    )
    dbias = dy.sum(dim=tuple(range(dy.dim() - 1))) if ctx.has_bias and wanted[5] else None
    return dx, db, da, dvalues, None, dbias, ds, None, None, None, None


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return gradients(ctx, dy, torch.ops.sltrain_dist.composed_linear_backward)


composed_linear.register_autograd(_backward, setup_context=save_inputs)


def workspace_bytes(
    out_features: int, in_features: int, support: int, tiles: Tiles, element_size: int, rank: int
) -> dict[str, int]:
    """Peak transient bytes of the reference implementation beside its inputs and outputs.

    Args:
        support: entries of S in the matrix (values / block**2).
        element_size: bytes per element of x.

    Returns:
        {"forward": W and the widened index of one panel; "backward": the larger of that and one
        panel of dW with its products}.
    """
    whole = tiles.tile_out not in (1, tiles.block) and tiles.tile_in not in (1, tiles.block)
    rows = min(tiles.panel_rows(out_features), out_features)
    index = support * 8 if whole else -(-support * rows // out_features) * 8
    forward = out_features * in_features * element_size + index
    panel = rows * in_features * element_size
    masks = (
        support * (1 + element_size) * 2 if whole else index // 8 * element_size * tiles.block**2
    )
    products = 2 * rows * rank * element_size + rank * in_features * (4 + 2 * element_size)
    return {"forward": forward, "backward": max(forward, panel + index + masks + products)}


@register_flop_formula(torch.ops.sltrain_dist.composed_linear)
def _forward_flops(
    x: Any, b: Any, a: Any, values: Any, *rest: Any, out_shape: Any = None, **_: Any
) -> int:
    tokens = 1
    for size in x[:-1]:
        tokens *= size
    products = tokens + (b[1] if b is not None else 0)
    return int(2 * products * out_shape[-1] * x[-1])


@register_flop_formula(torch.ops.sltrain_dist.composed_linear_backward)
def _backward_flops(dy: Any, x: Any, b: Any, a: Any, values: Any, *rest: Any, **_: Any) -> int:
    tokens = 1
    for size in x[:-1]:
        tokens *= size
    rank = b[1] if b is not None else 0
    return int((4 * tokens + 6 * rank) * dy[-1] * x[-1])
