#!/usr/bin/env python
"""Time to generate all supports of a preset on one core, per kind: python benchmarks/supports.py --model llama_7b

Prints seconds and entries per second of each kind, and the time of the hash that every start computes.
The medians are over --repeat runs of one decoder layer, times the number of layers.
"""

import argparse
import statistics
import time

import torch

from sltrain_dist.config import ModelConfig
from sltrain_dist.params import Support, partial_hash


def layer_shapes(config: ModelConfig) -> list[tuple[int, int, bool]]:
    """(out, in, row parallel) of the seven linears of a decoder layer."""
    hidden, ff = config.hidden_size, config.padded_intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    column = [(query, hidden), (key, hidden), (key, hidden), (ff, hidden), (ff, hidden)]
    return [(*shape, False) for shape in column] + [(hidden, query, True), (hidden, ff, True)]


def measure(config: ModelConfig, kind: str, density: float, block: int) -> tuple[float, float, int]:
    """Seconds to generate and to hash one layer's supports, and their number of offsets."""
    generated = hashed = 0.0
    entries = 0
    for number, (out, in_, row_parallel) in enumerate(layer_shapes(config)):
        support = Support.plan(kind, (out, in_), density, block=block, transposed=row_parallel)
        count = torch.Size(support.offsets_shape).numel()
        began = time.perf_counter()
        offsets = support.offsets(0, f"layer.{number}", 0, count)
        middle = time.perf_counter()
        partial_hash(0, f"layer.{number}", 0, offsets)
        generated += middle - began
        hashed += time.perf_counter() - middle
        entries += count
    return generated, hashed, entries


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama_7b")
    parser.add_argument("--sp_ratio", type=float, default=0.05)
    parser.add_argument("--block_size", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = ModelConfig.load(arguments.model)
    print(
        f"{config.name}, density {arguments.sp_ratio}, one core, {config.num_hidden_layers} layers"
    )
    for kind in ("fan_in", "uniform", "block"):
        block = arguments.block_size if kind == "block" else 1
        runs = [measure(config, kind, arguments.sp_ratio, block) for _ in range(arguments.repeat)]
        layers = config.num_hidden_layers
        generate = [run[0] * layers for run in runs]
        hashing = statistics.median(run[1] * layers for run in runs)
        print(
            f"{kind:8} generate {statistics.median(generate):6.1f} s ({min(generate):.1f} to {max(generate):.1f}), "
            f"hash {hashing:5.1f} s, {runs[0][2] * layers / 1e6:.1f} M offsets"
        )


if __name__ == "__main__":
    main()
