"""The factorized path with block supports as matrix products on the GPU: operators around Triton kernels.

    y  = s h B^T + x S^T + bias,  h = x A^T             dB = s dy^T h,   ds = sum(dB/s * B)
    dx = s g A + dy S,            g = dy B              dA = s g^T x,    dvalues = dy^T x at the support

y and dx are each one product over an extended inner dimension: [h, x_blocks] times [B, S_blocks], with
the x_blocks gathered as the support says. Products with a common right-hand side for all columns (h, g, dB,
dA) stay with torch.mm. Supports with blocks under 16 and dtypes other than float32 and bfloat16 take the
reference. Nothing here waits for the device: lists of blocks are built on it by a stable sort.

Triton is imported when the first kernel is launched; the package works without it.

Shapes: n tokens, r rank, b side of a block, E blocks in S (values [N, C, k, b*b], E = N C k), G blocks of
columns of a product's result.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sltrain_dist.ops.tiles import Tiles, matrix_shape

BLOCKS = (16, 32, 64)
DTYPES = (torch.float32, torch.bfloat16)
PROGRAMS = 1024  # of sampled_blocks, at the least: several for each multiprocessor
PART_ROWS = 512  # and at least so many rows for each


def supported(x: Tensor, values: Tensor, tiles: Tiles) -> bool:
    """Whether the kernels here do this product."""
    return values.dim() == 4 and tiles.block in BLOCKS and x.dtype in DTYPES


@dataclass(frozen=True)
class BlockList:
    """The blocks of S by block of columns of a result, on the device, int32.

    pointer [G + 1]: where each group's entries start; partner [E]: block of columns of the input that an
    entry multiplies; slot [E]: its number in ``values``.
    """

    pointer: Tensor
    partner: Tensor
    slot: Tensor


def coordinates(offsets: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """(block-row, block-column) of every block of S in the order of ``values``; int32 [E] each."""
    n, c, _ = offsets.shape
    own = offsets.to(torch.int32)
    row = torch.arange(n, dtype=torch.int32, device=offsets.device)[:, None, None]
    column = torch.arange(c, dtype=torch.int32, device=offsets.device)[None, :, None]
    if tiles.tile_out == tiles.block:
        column = column * (tiles.tile_in // tiles.block) + own
    else:
        row = row * (tiles.tile_out // tiles.block) + own
    return row.expand_as(own).reshape(-1), column.expand_as(own).reshape(-1)


def block_list(offsets: Tensor, tiles: Tiles, by_rows: bool, groups: int) -> BlockList:
    """The blocks of S grouped by block-row or by block-column, each group in the order of ``values``."""
    rows, columns = coordinates(offsets, tiles)
    key, partner = (rows, columns) if by_rows else (columns, rows)
    bounds = torch.arange(groups + 1, dtype=torch.int32, device=key.device)
    if by_rows and tiles.tile_out == tiles.block:  # in order already, the same number in each
        slot = torch.arange(key.numel(), dtype=torch.int32, device=key.device)
        return BlockList(bounds * (key.numel() // groups), partner, slot)
    in_order, slot = torch.sort(key, stable=True)
    pointer = torch.searchsorted(in_order, bounds, out_int32=True)
    return BlockList(pointer, partner[slot], slot.to(torch.int32))


def fuses(rank: int, block: int) -> bool:
    """Whether the low-rank part belongs in the kernel rather than in a product of its own before it.

    A program's result is only one block wide, so the kernel reads h out/b times from the L2 cache, while a
    product of its own writes y once and reads it again. Equal, on paper for an H200, near r = 2.5 b.
    """
    return 2 * rank <= 5 * block


def extended_product(
    u: Tensor,
    hidden: Tensor | None,
    factor: Tensor | None,
    values: Tensor,
    blocks: BlockList,
    bias: Tensor | None,
    scaling: Tensor | None,
    scale: float,
    block: int,
    transposed: bool,
    fused: bool | None = None,
) -> Tensor:
    """s * hidden factor + u S + bias, where S has the blocks listed (each transposed if ``transposed``).

    Args:
        u: [n, inner]; hidden: [n, r]; factor: [r, columns], any strides; both or neither.
        values: [..., b*b] contiguous; blocks: by block of the result's columns.
        bias: [columns] or None; scaling: s as float32 [1], or None: s = scale.
        fused: overrides ``fuses``.

    Returns:
        [n, columns] in the dtype of u: float32 sums, rounded once (twice where not fused).
    """
    from sltrain_dist.ops import block_kernels

    n, groups = u.shape[0], blocks.pointer.numel() - 1
    rank = 0 if hidden is None else hidden.shape[1]
    in_kernel = rank > 0 and (fuses(rank, block) if fused is None else fused)
    base = rank > 0 and not in_kernel
    y = u.new_empty(n, groups * block)
    if y.numel() == 0:
        return y
    if base:
        assert hidden is not None
        assert factor is not None
        torch.mm(hidden, factor, out=y)
    if not in_kernel or hidden is None or factor is None:
        hidden, factor = u, u  # not read
    block_kernels.launch_extended_product(
        groups,
        n,
        u,
        y,
        hidden,
        factor,
        values,
        u if bias is None else bias.contiguous(),
        u if scaling is None else scaling,
        blocks.pointer,
        blocks.partner,
        blocks.slot,
        scale,
        n,
        rank,
        groups,
        blocks.partner.numel(),
        1 << (n - 1).bit_length(),
        u.stride(0),
        y.stride(0),
        hidden.stride(0),
        factor.stride(0),
        factor.stride(1),
        HAS_RANK=in_kernel,
        HAS_BASE=base,
        HAS_BIAS=bias is not None,
        HAS_SCALING=scaling is not None,
        BLOCK=block,
        VALUE_K=1 if transposed else block,
        VALUE_M=block if transposed else 1,
        RANK_CHUNK=64 if block == 64 and u.dtype == torch.bfloat16 else 32,
        PRECISION=block_kernels.precision(u.dtype),
    )
    return y


def sampled_blocks(dy: Tensor, x: Tensor, rows: Tensor, columns: Tensor, block: int) -> Tensor:
    """dV [E, b*b] in the dtype of x: the blocks (rows, columns) of dy^T x, summed in float32.

    Few blocks are cut along the tokens as well; their parts are added in a fixed order.
    """
    from sltrain_dist.ops import block_kernels

    n, count = x.shape[0], rows.numel()
    if n == 0 or count == 0:
        return x.new_zeros(count, block * block)
    parts = max(1, min(-(-PROGRAMS // count), n // PART_ROWS))
    span = -(-n // (parts * block_kernels.STEP)) * block_kernels.STEP
    parts = -(-n // span)
    dtype = x.dtype if parts == 1 else torch.float32
    result = torch.empty(parts, count, block * block, dtype=dtype, device=x.device)
    block_kernels.launch_sampled_blocks(
        parts * count,
        dy,
        x,
        result,
        rows,
        columns,
        n,
        count,
        span,
        dy.stride(0),
        x.stride(0),
        BLOCK=block,
        PRECISION=block_kernels.precision(x.dtype),
    )
    return result[0] if parts == 1 else result.sum(0).to(x.dtype)


def _tokens(x: Tensor, features: int) -> Tensor:
    """x as [n, features] with neighbouring features side by side in memory."""
    flat = x.reshape(-1, features)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _wide_scale(scaling: Tensor | None) -> Tensor | None:
    return None if scaling is None else torch.tanh(scaling.float())


def forward(
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
    keep_hidden: bool = False,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """``factorized_linear`` for supports with blocks of 16, 32 or 64; float32 or bfloat16."""
    tiles = Tiles(tile_out, tile_in, block)
    out_features, in_features = matrix_shape(values, tiles)
    x2 = _tokens(x, in_features)
    low_rank = b is not None and a is not None
    hidden = x2 @ a.t() if low_rank and a is not None else None
    y = extended_product(
        x2,
        hidden,
        b.t() if low_rank and b is not None else None,
        values.contiguous(),
        block_list(offsets, tiles, True, out_features // block),
        bias,
        _wide_scale(scaling),
        scale,
        block,
        transposed=True,
        fused=fused,
    )
    kept = hidden if keep_hidden and hidden is not None else x.new_empty(0)
    return y.view(*x.shape[:-1], out_features), kept


def backward(
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
    fused: bool | None = None,
) -> list[Tensor]:
    """``factorized_linear_backward`` for the same: [dx, dB, dA, dvalues, dscaling], empty where not needed."""
    tiles = Tiles(tile_out, tile_in, block)
    out_features, in_features = matrix_shape(values, tiles)
    dy2, x2 = _tokens(dy, out_features), _tokens(x, in_features)
    need_x, need_b, need_a, need_values, need_scaling = needs
    dx, db, da, dvalues, ds = (x.new_empty(0) for _ in range(5))
    s = _wide_scale(scaling)
    g = None
    if b is not None and a is not None:
        if need_b or need_scaling:
            h = x2 @ a.t() if hidden is None else hidden
            db, ds = _factor_gradients(dy2, h, b, scaling, scale, need_b, need_scaling)
        g = dy2 @ b if need_x or need_a else None
        if need_a and g is not None:
            da, _ = _factor_gradients(g, x2, a, scaling, scale, True, False)
    if need_x:
        by_column = block_list(offsets, tiles, False, in_features // block)
        dx = extended_product(
            dy2, g, a if g is not None else None, values.contiguous(), by_column,
            None, s, scale, block, transposed=False, fused=fused,
        ).view(x.shape)  # fmt: skip
    if need_values:
        rows, columns = coordinates(offsets, tiles)
        dvalues = sampled_blocks(dy2, x2, rows, columns, block).view(values.shape)
    return [dx, db, da, dvalues, ds]


def _factor_gradients(
    left: Tensor,
    right: Tensor,
    factor: Tensor,
    scaling: Tensor | None,
    scale: float,
    need_factor: bool,
    need_scaling: bool,
) -> tuple[Tensor, Tensor]:
    """(s left^T right, d s / d scaling * sum(left^T right * factor)); empty where not needed."""
    ds = left.new_empty(0)
    s = _wide_scale(scaling)
    if s is None or scaling is None:  # beta = 0: factor is not read
        return torch.addmm(factor, left.t(), right, beta=0, alpha=scale), ds
    product = left.t() @ right
    if need_scaling:
        ds = (product.float() * factor).sum().mul(1 - s * s).to(scaling.dtype)
    return product.mul_(s.to(product.dtype)) if need_factor else left.new_empty(0), ds


def register(
    forward_operator: Any,
    backward_operator: Any,
    forward_reference: Callable[..., tuple[Tensor, Tensor]],
    backward_reference: Callable[..., list[Tensor]],
) -> bool:
    """Make these kernels the CUDA implementation of the two operators where Triton is installed.

    Block supports take them, everything else the reference. Returns whether they were registered.
    """
    if importlib.util.find_spec("triton") is None:
        return False

    def on_cuda(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        values, tiles = rest[2], Tiles(*rest[-4:-1])
        if supported(x, values, tiles):
            with torch.cuda.device_of(x):  # Triton launches on the current device
                return forward(x, *rest)
        return forward_reference(x, *rest)

    def backward_on_cuda(dy: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
        values, tiles = rest[2], Tiles(*rest[-4:-1])
        if supported(x, values, tiles):
            with torch.cuda.device_of(x):
                return backward(dy, x, *rest)
        return backward_reference(dy, x, *rest)

    forward_operator.register_kernel("cuda")(on_cuda)
    backward_operator.register_kernel("cuda")(backward_on_cuda)
    return True
