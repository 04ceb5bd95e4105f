# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# ruff: noqa: N803 (Triton writes its compile-time constants in capitals)
"""Triton kernels for block supports; imported only where triton is (see ops.block_triton).

    extended_product   y[:, block m] = s * (base + hidden factor_m) + sum over its blocks of u_block V + bias
    sampled_blocks     dV_e = dy[:, rows of e]^T x[:, columns of e]

The first is one product over an extended inner dimension, [hidden, u_blocks] times [factor, V_blocks],
accumulated in float32 and rounded once; it serves y = s h B^T + x S^T and dx = s (dy B) A + dy S alike,
for either orientation of the tiles, because the blocks of S come as a list per block of columns of y.
Tuning chooses how many rows a program takes, its warps and its pipeline; none of these changes the
order of any sum, so a resumed run that tunes otherwise computes the same bits.

The same source runs under Triton's interpreter on a CPU (TRITON_INTERPRET=1), without tuning.
"""

from typing import Any

import torch
import triton
import triton.language as tl


# Neither the row count nor what only the tuner reads is worth a compilation of its own.
@triton.jit(do_not_specialize=["n", "blocks", "n_rounded"])
def extended_product(
    u,
    y,
    hidden,
    factor,
    values,
    bias,
    scaling,
    pointer,
    partner,
    slot,
    scale,
    n,
    rank,
    groups,
    blocks,  # read by the tuner's key alone, as is n_rounded
    n_rounded,
    u_row,
    y_row,
    hidden_row,
    factor_k,
    factor_m,
    HAS_RANK: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALING: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_K: tl.constexpr,
    VALUE_M: tl.constexpr,
    RANK_CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
):
    """y [ROWS rows, one block of columns] of a program; arguments as in ops.block_triton.

    u, hidden and y have neighbouring columns side by side; factor [rank, columns] any strides. VALUE_K and
    VALUE_M are the strides of a block of values along the inner dimension and along the columns of y.
    """
    program = tl.program_id(0)
    # Neighbouring programs share rows: the rows of u and hidden stay in the L2 cache.
    group = program % groups
    rows = (program // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (rows < n)[:, None]
    lanes = tl.arange(0, BLOCK)
    columns = group.to(tl.int64) * BLOCK + lanes
    acc = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if HAS_BASE:
        base = tl.load(y + rows[:, None] * y_row + columns[None, :], mask=inside, other=0.0)
        acc += base.to(tl.float32)
    if HAS_RANK:
        steps = tl.arange(0, RANK_CHUNK)
        for begin in range(0, rank, RANK_CHUNK):
            inner = begin + steps
            h = tl.load(
                hidden + rows[:, None] * hidden_row + inner[None, :],
                mask=inside & (inner < rank)[None, :],
                other=0.0,
            )
            f = tl.load(
                factor + inner.to(tl.int64)[:, None] * factor_k + columns[None, :] * factor_m,
                mask=(inner < rank)[:, None],
                other=0.0,
            )
            acc = tl.dot(h, f, acc, input_precision=PRECISION)
    if HAS_RANK or HAS_BASE:
        if HAS_SCALING:
            acc *= tl.load(scaling)
        else:
            acc *= scale
    first = tl.load(pointer + group)
    last = tl.load(pointer + group + 1)
    for entry in range(first, last):
        source = tl.load(partner + entry).to(tl.int64) * BLOCK
        place = tl.load(slot + entry).to(tl.int64) * (BLOCK * BLOCK)
        ub = tl.load(u + rows[:, None] * u_row + (source + lanes)[None, :], mask=inside, other=0.0)
        vb = tl.load(values + place + lanes[:, None] * VALUE_K + lanes[None, :] * VALUE_M)
        acc = tl.dot(ub, vb, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + columns)[None, :].to(tl.float32)
    tl.store(y + rows[:, None] * y_row + columns[None, :], acc.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "span"])
def sampled_blocks(
    dy,
    x,
    result,
    block_row,
    block_column,
    n,
    blocks,
    span,
    dy_row,
    x_row,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """result [parts, blocks, BLOCK, BLOCK]: one block over one part of the rows."""
    program = tl.program_id(0)
    # Neighbouring programs share rows here too; each takes `span` of them, a multiple of STEP.
    entry = program % blocks
    part = program // blocks
    lanes = tl.arange(0, BLOCK)
    out_lanes = tl.load(block_row + entry).to(tl.int64) * BLOCK + lanes
    in_lanes = tl.load(block_column + entry).to(tl.int64) * BLOCK + lanes
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    start = part.to(tl.int64) * span
    for begin in range(0, span, STEP):
        rows = start + begin + tl.arange(0, STEP)
        inside = (rows < n)[:, None]
        left = tl.load(dy + rows[:, None] * dy_row + out_lanes[None, :], mask=inside, other=0.0)
        right = tl.load(x + rows[:, None] * x_row + in_lanes[None, :], mask=inside, other=0.0)
        acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)
    target = result + program.to(tl.int64) * (BLOCK * BLOCK)
    tl.store(target + lanes[:, None] * BLOCK + lanes[None, :], acc.to(result.dtype.element_ty))


STEP = 64  # rows of one step of sampled_blocks
_CONFIGS = [
    triton.Config({"ROWS": 64}, num_warps=4, num_stages=4),
    triton.Config({"ROWS": 128}, num_warps=4, num_stages=3),
    triton.Config({"ROWS": 128}, num_warps=8, num_stages=3),
    triton.Config({"ROWS": 256}, num_warps=8, num_stages=3),
]
_KEY = "n_rounded rank groups blocks BLOCK VALUE_K HAS_RANK HAS_BASE".split()


def interpreted() -> bool:
    """Whether the kernels of this module run under Triton's interpreter."""
    return not isinstance(extended_product, triton.runtime.JITFunction)


# y is input and output where HAS_BASE: every timed run must find it as it was.
_tuned: Any = (
    None
    if interpreted()
    else triton.autotune(configs=_CONFIGS, key=_KEY, restore_value=["y"])(extended_product)
)


def launch_extended_product(
    programs_per_row_tile: int, n: int, *args: Any, **constants: Any
) -> None:
    """One program per ``ROWS`` rows and block of columns; tuned once per key, except in the interpreter."""

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(n, meta["ROWS"]) * programs_per_row_tile,)

    if _tuned is not None:
        _tuned[grid](*args, **constants)
    else:
        extended_product[grid](*args, **constants, ROWS=32)


def launch_sampled_blocks(programs: int, *args: Any, **constants: Any) -> None:
    """One program per block of S and part of the rows."""
    sampled_blocks[(programs,)](*args, **constants, STEP=STEP)


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed: exactly, unless torch is allowed tf32 as well."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "ieee"
