#!/usr/bin/env python
"""Time to generate all supports of a preset, per kind: python benchmarks/support.py --model llama_7b

On a CPU with one thread. Prints the seconds to generate the offsets of the whole model and the seconds of the
hash that every start computes: medians over --repeat runs of one decoder layer, times the number of layers.
"""

import argparse
import time
from typing import Any

import torch
from measure import chart, finish, flags, table, wait, write

from sltrain_dist.config import ModelConfig, SupportKind
from sltrain_dist.params import Support, partial_hash

KINDS: tuple[SupportKind, ...] = ("fan_in", "uniform", "block")


def layer_shapes(config: ModelConfig) -> list[tuple[int, int, bool]]:
    """(out, in, row parallel) of the seven linears of a decoder layer."""
    hidden, ff = config.hidden_size, config.padded_intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    column = [(query, hidden), (key, hidden), (key, hidden), (ff, hidden), (ff, hidden)]
    return [(*shape, False) for shape in column] + [(hidden, query, True), (hidden, ff, True)]


def layer(
    config: ModelConfig, kind: SupportKind, density: float, block: int, device: str
) -> tuple[float, float, int]:
    """Seconds to generate and to hash one layer's supports, and their number of offsets."""
    generated = hashed = 0.0
    entries = 0
    for number, (out, in_, row_parallel) in enumerate(layer_shapes(config)):
        support = Support.plan(kind, (out, in_), density, block=block, transposed=row_parallel)
        count = torch.Size(support.offsets_shape).numel()
        wait(device)
        began = time.perf_counter()
        offsets = support.offsets(0, f"layer.{number}", 0, count, device)
        wait(device)
        middle = time.perf_counter()
        partial_hash(0, f"layer.{number}", 0, offsets)
        generated += middle - began
        hashed += time.perf_counter() - middle
        entries += count
    return generated, hashed, entries


def measure(
    config: ModelConfig, kind: SupportKind, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The row of a kind: [median, lowest, highest] seconds of the whole model."""
    block = arguments.block_size if kind == "block" else 1
    runs = [
        layer(config, kind, arguments.sp_ratio, block, arguments.device)
        for _ in range(arguments.repeat)
    ]
    layers = config.num_hidden_layers
    generated, hashed = (sorted(run[part] * layers for run in runs) for part in (0, 1))
    middle = len(runs) // 2
    return {
        "model": config.name, "support": kind, "density": arguments.sp_ratio, "block": block,
        "offsets": runs[0][2] * layers,
        "generate_seconds": [generated[middle], generated[0], generated[-1]],
        "hash_seconds": [hashed[middle], hashed[0], hashed[-1]],
    }  # fmt: skip


def main() -> None:
    """Measure, print and write."""
    parser = flags(__doc__)
    parser.add_argument("--model", default="llama_7b")
    parser.add_argument("--sp_ratio", type=float, default=0.05)
    parser.add_argument("--block_size", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.model, arguments.sp_ratio = "llama_9m", 0.06
        arguments.block_size, arguments.repeat = 4, 1
    torch.set_num_threads(1)
    config = ModelConfig.load(arguments.model)
    rows = []
    for kind in KINDS:
        rows.append(measure(config, kind, arguments))
        write(arguments.out, arguments.device, rows)
    cells: list[list[object]] = [["support", "generate s", "hash s", "million offsets"]]
    for row in rows:
        texts = [
            f"{v[0]:.2f} [{v[1]:.2f} to {v[2]:.2f}]"
            for v in (row["generate_seconds"], row["hash_seconds"])
        ]
        cells.append([row["support"], *texts, f"{row['offsets'] / 1e6:.2f}"])
    print(f"{config.name}, density {arguments.sp_ratio}, {arguments.device}, one thread")
    print(table(cells))
    groups = {
        row["support"]: {"generate": row["generate_seconds"], "hash": row["hash_seconds"]}
        for row in rows
    }
    chart(arguments.out, f"Supports of {config.name}, {arguments.device}", "seconds", groups)


if __name__ == "__main__":
    finish(main)
