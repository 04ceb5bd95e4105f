#!/usr/bin/env python
"""Time and memory of one SLTrain linear, forward and backward: ours, plain dense, and the reference's formula.

    python benchmarks/linear.py --device cpu --shapes 512x512 1376x512 --tokens 1024

All three run in the same process, turn by turn; medians of ratios to dense, with the range in brackets. The
reference formula builds W, and in backward the whole of dW, with int64 indices and a scaled copy of A.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sltrain_dist.ops.composed import sltrain_linear
from sltrain_dist.params.support import Support


class ReferenceFormula(torch.autograd.Function):
    """y = x (B A' + S)^T with A' = scale * A made outside, as the published description has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor, a: Tensor, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, b, a, values, index)
        w = (b @ a).view(-1).scatter_add(0, index, values).view(b.shape[0], a.shape[1])
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, b, a, values, index = ctx.saved_tensors
        w = (b @ a).view(-1).scatter_add(0, index, values).view(b.shape[0], a.shape[1])
        dx = dy @ w
        dw = dy.t() @ x
        return dx, dw @ a.t(), b.t() @ dw, dw.view(-1).gather(0, index), None


def candidates(
    out: int, in_: int, rank: int, density: float, dtype: torch.dtype, device: str
) -> dict[str, tuple[list[Tensor], Callable[[Tensor], Tensor]]]:
    """Name -> (leaves, function of x) for every implementation and support."""
    make: dict[str, Any] = {"dtype": dtype, "device": device}
    scale = 0.25
    b, a = (torch.randn(*shape, **make).requires_grad_() for shape in ((out, rank), (rank, in_)))
    weight = torch.randn(out, in_, **make).requires_grad_()
    found: dict[str, tuple[list[Tensor], Callable[[Tensor], Tensor]]] = {
        "dense": ([weight], lambda x: x @ weight.t())
    }
    for kind in ("fan_in", "uniform", "block"):
        support = Support.plan(kind, (out, in_), density, block=16 if kind == "block" else 1)
        count = torch.Size(support.offsets_shape).numel()
        offsets = support.offsets(0, "layer", 0, count, device).view(support.offsets_shape)
        values = torch.randn(support.values_shape, **make).requires_grad_()

        def ours(
            x: Tensor, v: Tensor = values, o: Tensor = offsets, s: Support = support
        ) -> Tensor:
            return sltrain_linear(x, (b, a), v, o, None, None, scale, s.tiles)

        found[f"ours {kind}"] = ([b, a, values], ours)
        if kind == "uniform":
            index = offsets.long()

            def reference(x: Tensor, v: Tensor = values, i: Tensor = index) -> Tensor:
                y: Tensor = ReferenceFormula.apply(x, b, a * scale, v, i)
                return y

            found["reference formula"] = ([b, a, values], reference)
    return found


def once(
    leaves: list[Tensor], function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor
) -> tuple[float, int]:
    """Seconds of one forward and backward, and on CUDA the peak bytes above what stood before."""
    cuda = x.is_cuda
    before = 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    began = time.perf_counter()
    grads = torch.autograd.grad(function(x), [x, *leaves], dy)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    del grads
    return seconds, torch.cuda.max_memory_allocated() - before if cuda else 0


def measure(
    out: int,
    in_: int,
    tokens: int,
    rank: int,
    density: float,
    dtype: torch.dtype,
    device: str,
    repeat: int,
) -> dict[str, dict[str, float]]:
    """Milliseconds, ratio to dense (median, lowest, highest) and peak bytes of every candidate."""
    found = candidates(out, in_, rank, density, dtype, device)
    x = torch.randn(tokens, in_, dtype=dtype, device=device).requires_grad_()
    dy = torch.randn(tokens, out, dtype=dtype, device=device)
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in found}
    for turn in range(repeat + 2):
        for name, (leaves, function) in found.items():
            result = once(leaves, function, x, dy)
            if turn >= 2:  # the first two warm up
                runs[name].append(result)
    dense = [seconds for seconds, _ in runs["dense"]]
    rows = {}
    for name, results in runs.items():
        ratios = [seconds / base for (seconds, _), base in zip(results, dense, strict=True)]
        rows[name] = {
            "milliseconds": statistics.median(seconds for seconds, _ in results) * 1e3,
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "peak_bytes": max(peak for _, peak in results),
        }
    return rows


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Print one table."""
    print(title)
    for name, row in rows.items():
        memory = f", peak {row['peak_bytes'] / 2**20:.0f} MiB" if row["peak_bytes"] else ""
        print(
            f"  {name:18} {row['milliseconds']:8.2f} ms, {row['ratio']:.2f} x dense "
            f"[{row['lowest']:.2f} to {row['highest']:.2f}]{memory}"
        )


def main() -> None:
    """Measure and print every shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--shapes", nargs="+", default=["512x512", "1376x512", "2048x2048"], help="out x in"
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--sp_ratio", type=float, default=0.03)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--json", help="write the rows to this file")
    arguments = parser.parse_args()
    tables = {}
    for shape in arguments.shapes:
        out, in_ = (int(size) for size in shape.split("x"))
        dtype = getattr(torch, arguments.dtype)
        tables[shape] = measure(
            out,
            in_,
            arguments.tokens,
            arguments.rank,
            arguments.sp_ratio,
            dtype,
            arguments.device,
            arguments.repeat,
        )
        show(
            f"{shape}, {arguments.tokens} tokens, rank {arguments.rank}, {arguments.dtype}, {arguments.device}",
            tables[shape],
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(tables, file, indent=1)


if __name__ == "__main__":
    main()
