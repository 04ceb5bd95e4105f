#!/usr/bin/env python
"""Every operator on the device against dense float64 formulas on the CPU: all supports, float32 and bfloat16, both paths.

    python benchmarks/correctness.py --device cuda

The errors are relative, norm of the difference over norm of the result, the largest over outputs and gradients.
Supports generated on the device must equal those generated on the CPU. The exit code is 1 if a bound is broken.
"""

import argparse
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import finish, flags, table, write
from torch import Tensor

from sltrain_dist.ops.linear import PATHS, sltrain_linear
from sltrain_dist.ops.sparse import sparse_backward, sparse_forward
from sltrain_dist.ops.support import add_support, gather_support
from sltrain_dist.params.support import Support

KINDS = {"fan_in": (1, False), "uniform": (1, False), "block": (16, False), "block transposed": (16, True)}  # fmt: skip
BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2}
DENSITY = 0.0625

SCALE = 0.25

Inputs = dict[str, Tensor]
Operator = Callable[[Inputs, Support], list[Tensor]]


def linear(path: Any) -> Operator:
    """Output and gradients of the whole linear."""

    def run(inputs: Inputs, support: Support) -> list[Tensor]:
        x, b, a, v = (inputs[n].detach().requires_grad_() for n in ("x", "b", "a", "values"))
        y = sltrain_linear(x, (b, a), v, inputs["offsets"], None, None, SCALE, support.tiles, path)
        return [y.detach(), *torch.autograd.grad(y, [x, b, a, v], inputs["dy"])]

    return run


def sizes(support: Support) -> tuple[int, int, int]:
    """The three integers every operator ends with."""
    return support.tiles.tile_out, support.tiles.tile_in, support.tiles.block


def add(inputs: Inputs, support: Support) -> list[Tensor]:
    """W + S."""
    w = inputs["w"].clone()
    add_support(w, inputs["values"], inputs["offsets"], *sizes(support))
    return [w]


def gather(inputs: Inputs, support: Support) -> list[Tensor]:
    """W at the support, read in two panels of rows where tiles allow it."""
    w, found = inputs["w"], torch.zeros_like(inputs["values"])
    half = support.shape[0] // (1 if support.kind == "block" and support.grid[0] == 1 else 2)
    for start in range(0, support.shape[0], half):
        panel = w[start : start + half].contiguous()
        gather_support(panel, start, found, inputs["offsets"], *sizes(support))
    return [found]


def sparse(inputs: Inputs, support: Support) -> list[Tensor]:
    """Products with S and the sampled product."""
    x, dy, values, offsets = (inputs[name] for name in ("x", "dy", "values", "offsets"))
    y, dx = torch.zeros_like(dy), torch.zeros_like(x)
    sparse_forward(x, y, values, offsets, *sizes(support))
    return [y, dx, sparse_backward(dy, x, dx, values, offsets, *sizes(support), True)]


OPERATORS: dict[str, Operator] = {
    **{path: linear(path) for path in PATHS},
    "add_support": add,
    "gather_support": gather,
    "sparse": sparse,
}


def definitions(inputs: Inputs, support: Support) -> dict[str, list[Tensor]]:
    """What every operator must give, from dense matrices and views of them alone."""
    x, dy, b, a, w, values = (inputs[n] for n in ("x", "dy", "b", "a", "w", "values"))
    tiles, whole = support.tiles, values.dim() == 1
    index = inputs["offsets"].long() if whole else tiles.index(inputs["offsets"])

    def at_support(matrix: Tensor) -> Tensor:
        if whole:
            return matrix.reshape(-1)[index]
        return tiles.view(matrix).gather(2, index).reshape(values.shape)

    s = torch.zeros_like(w)
    if whole:
        s.view(-1)[index] = values
    else:
        tiles.view(s).scatter_(2, index, tiles.blocks(values))
    composed, dw = SCALE * b @ a + s, dy.t() @ x
    both = [x @ composed.t(), dy @ composed, SCALE * dw @ a.t(), SCALE * b.t() @ dw, at_support(dw)]
    return {
        **dict.fromkeys(PATHS, both),
        "add_support": [w + s],
        "gather_support": [at_support(w)],
        "sparse": [x @ s.t(), dy @ s, at_support(dw)],
    }


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error."""
    return max(
        float((f.cpu().double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)
    )


def measure(device: str, quick: bool) -> Iterator[dict[str, Any]]:
    """A row per support, operator and dtype."""
    out, in_, rank, tokens = (128, 256, 8, 33) if quick else (2048, 1024, 128, 1000)
    for kind, (block, transposed) in KINDS.items():
        name: Any = kind.split()[0]
        block = min(block, 8) if quick else block
        support = Support.plan(name, (out, in_), DENSITY, block=block, transposed=transposed)
        count = torch.Size(support.offsets_shape).numel()
        offsets = support.offsets(7, "layer", 0, count)
        same = torch.equal(offsets, support.offsets(7, "layer", 0, count, device).cpu())
        yield {"support": kind, "operator": "generate", "dtype": "", "error": 0.0, "passed": same}
        shapes = {"x": (tokens, in_), "dy": (tokens, out), "b": (out, rank), "a": (rank, in_),
                  "w": (out, in_), "values": support.values_shape}  # fmt: skip
        for dtype, bound in BOUNDS.items():
            narrow = {n: torch.randn(s).to(getattr(torch, dtype)) for n, s in shapes.items()}
            exact = {n: t.double() for n, t in narrow.items()}
            exact["offsets"] = narrow["offsets"] = offsets.view(support.offsets_shape)
            there = {n: t.to(device) for n, t in narrow.items()}
            wanted = definitions(exact, support)
            for operator, run in OPERATORS.items():
                row: dict[str, Any] = {"support": kind, "operator": operator, "dtype": dtype}
                try:
                    worst = error(run(there, support), wanted[operator])
                    yield {**row, "error": worst, "passed": worst < bound}
                except Exception as problem:
                    traceback.print_exc()
                    yield {**row, "error": None, "passed": False, "problem": str(problem)[:500]}


def main() -> int:
    """Check, print and write; 1 if anything failed."""
    arguments: argparse.Namespace = flags(__doc__).parse_args()
    rows = []
    torch.manual_seed(0)
    for row in measure(arguments.device, arguments.quick):
        rows.append(row)
    write(arguments.out, arguments.device, rows)
    cells: list[list[object]] = [["support", "operator", "dtype", "error", ""]]
    for row in rows:
        worst = "" if row["error"] is None else f"{row['error']:.1e}"
        verdict = "" if row["passed"] else "FAILED"
        cells.append([row["support"], row["operator"], row["dtype"], worst, verdict])
    print(table(cells))
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    finish(main)
