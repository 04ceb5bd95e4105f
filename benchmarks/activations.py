#!/usr/bin/env python
"""What is kept between forward and backward, and what a pass takes: each kind of checkpointing and offloading.

    python benchmarks/activations.py --device cuda --model llama_350m --batch_size 16

Gradients must be those of a pass that keeps everything on the device: a copy that has not arrived when it is used shows
here, as does a forgotten output that is filled too late. The exit code is 1 if they are not. Bytes are counted on
CUDA alone.
"""

import time
from typing import Any

import torch
from measure import finish, flags, table, write
from torch import Tensor

from sltrain_dist.config import MethodConfig, ModelConfig
from sltrain_dist.model.llama import Llama
from sltrain_dist.params import collect_specs

# name: (checkpointing, offload)
WAYS: dict[str, tuple[Any, bool]] = {
    "none": ("none", False),
    "selective": ("selective", False),
    "block": ("block", False),
    "none, offloaded": ("none", True),
    "block, offloaded": ("block", True),
}
BOUND = 2e-3  # relative error of all gradients together; some sums on a GPU have no fixed order
LENGTH, TURNS = 256, 5


def build(config: ModelConfig, device: str, way: str) -> Llama:
    """The model with its initial values, but for a B that is not zero."""
    checkpointing, offload = WAYS[way]
    method = MethodConfig(rank=config.hidden_size // 4)
    model = Llama(
        config, method, checkpointing=checkpointing, offload=offload, device=device, dtype=torch.bfloat16
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(1)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, spec in collect_specs(model).items():
            spec.fill(parameters[name].data, 1, name, 0)
            if name.endswith(".b"):
                parameters[name].normal_(std=0.02, generator=generator)
    return model


def measure(config: ModelConfig, device: str, way: str, tokens: Tensor) -> tuple[dict[str, Any], list[Tensor]]:  # fmt: skip
    """The row of a way, and its gradients."""
    model, cuda = build(config, device, way), device.startswith("cuda")
    trained = [p for p in model.parameters() if p.requires_grad]
    seconds, kept, gradients = [], 0, []
    for _ in range(TURNS):
        del gradients
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else 0
        began = time.perf_counter()
        hidden = model.model(tokens)
        if cuda:
            torch.cuda.synchronize()
            kept = torch.cuda.memory_allocated() - before
        gradients = list(torch.autograd.grad(hidden.float().square().mean(), trained, allow_unused=True))  # fmt: skip
        gradients = [gradient for gradient in gradients if gradient is not None]
        del hidden
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    row = {"way": way, "ms": 1e3 * sorted(seconds)[TURNS // 2], "kept_bytes": kept, "peak_bytes": peak}  # fmt: skip
    return row, [gradient.cpu() for gradient in gradients]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Relative, over all gradients."""
    squares = zip(found, exact, strict=True)
    difference = sum(float((f.double() - e.double()).square().sum()) for f, e in squares)
    return float((difference / sum(float(e.double().square().sum()) for e in exact)) ** 0.5)


def main() -> int:
    """Measure, print and write; 1 if gradients differ."""
    parser = flags(__doc__)
    parser.add_argument("--model", default="llama_350m")
    parser.add_argument("--batch_size", type=int, default=16, help=f"sequences of {LENGTH} tokens")
    arguments = parser.parse_args()
    config = ModelConfig.load("llama_9m" if arguments.quick else arguments.model)
    rows: list[dict[str, Any]] = []
    exact: list[Tensor] = []
    batch = 1 if arguments.quick else arguments.batch_size
    tokens = torch.arange(batch * LENGTH, device=arguments.device).view(batch, LENGTH) * 31
    for way in WAYS:
        row, found = measure(config, arguments.device, way, tokens % config.vocab_size)
        exact = exact or found
        rows.append({**row, "error": error(found, exact)})
        rows[-1]["passed"] = rows[-1]["error"] < BOUND
        write(arguments.out, arguments.device, rows, model=config.name, tokens=tokens.numel())
    cells: list[list[object]] = [["", "ms", "kept MiB", "peak MiB", "error", ""]]
    for row in rows:
        sizes = [row[name] / 2**20 for name in ("kept_bytes", "peak_bytes")]
        verdict = "" if row["passed"] else "FAILED"
        cells.append([row["way"], row["ms"], *sizes, f"{row['error']:.1e}", verdict])
    print(table(cells))
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    finish(main)
