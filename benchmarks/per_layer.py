#!/usr/bin/env python
"""Updates inside backward against the same optimizer stepped after it: are weights the same, what does each take at its peak?

    python benchmarks/per_layer.py --device cuda          (one GPU; 16 GiB of its memory for the last row)

First curves of one small model, stepped after backward twice and inside once: a GPU may not repeat itself to the bit, so
the second run says how far two equal runs are apart, and inside may be ten times as far, or 1e-6. An update that did not wait
for a gradient, on whichever stream, is further off. Then, on CUDA alone, the peaks of models at the paper's sizes, beside the
paper's figures for one GPU. The exit code is 1 if a curve differs.
"""

import gc
import importlib.util
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from measure import finish, flags, table, write

from sltrain_dist.config import TrainConfig
from sltrain_dist.model.backends import resolve_attention, resolve_norm
from sltrain_dist.optim import OptimizerFactory
from sltrain_dist.parallel.engine import Engine, build_engine
from sltrain_dist.parallel.mesh import Mesh, close, initialise
from sltrain_dist.train.build import make_model
from sltrain_dist.train.linear_paths import LinearPaths, decide
from sltrain_dist.train.settings import resolve
from sltrain_dist.train.update import update

OPTIMIZERS = ("adamw", "adamw8bit")
BOUND, UPDATES = 1e-6, 20
# (model, sequence length): GiB of the paper's 8-bit per-layer mode, or of a card
PEAKS = {("llama_350m", 256): 2.2, ("llama_1b", 256): 6.8, ("llama_7b", 256): 18.3, ("llama_7b", 2048): 16.0}  # fmt: skip
GB = {("llama_7b", 2048): 2**30}  # what PEAKS counts in; the paper in 10**9


def build(mesh: Mesh, model: str, optimizer: str, length: int, dtype: str) -> tuple[TrainConfig, Engine]:  # fmt: skip
    """One engine as pretrain builds it."""
    given = {"model": model, "optimizer": optimizer, "batch_size": 1 if dtype == "bfloat16" else 4, "max_length": length,
             "dtype": dtype, "activation_checkpointing": "block", "lr": 1e-3, "grad_clipping": 0.0,
             "gradient_accumulation": 1, "linear_path": "factorized"}  # fmt: skip
    if "8bit" in optimizer:
        given["embedding_state_bits"] = 8
    if dtype == "bfloat16":
        given["master_weights"] = "none"
    config = resolve([f"--{name}={value}" for name, value in given.items()], 1)
    number = getattr(torch, config.engine.dtype)
    attention = resolve_attention("auto", mesh.device, number, config.model.head_dim)
    norm = resolve_norm("auto", mesh.device, number, config.model.hidden_size)
    blank = make_model(config, attention, norm, None, None, device="meta", dtype=torch.float32)
    paths: LinearPaths = decide(config, blank, mesh.device, None)
    factory = partial(make_model, config, attention, norm, paths, None)
    chosen = OptimizerFactory(config.optimizer)
    return config, build_engine(factory, mesh, config.engine, chosen, config.method.seed)


def train(mesh: Mesh, config: TrainConfig, engine: Engine, updates: int) -> list[float]:
    """Losses of so many updates on the same random tokens."""
    run: Any = SimpleNamespace(config=config, mesh=mesh, engine=engine)
    shape, losses = (config.engine.batch_size, config.data.sequence_length + 1), []
    for number in range(updates):
        generator = torch.Generator().manual_seed(number % 2)
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
        batch = {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
        losses.append(update(run, [batch], config.optimizer.lr)[0])
    return losses


def far(one: list[float], other: list[float]) -> float:
    """Largest relative difference of two curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def compared(mesh: Mesh, optimizer: str, quick: bool, dtype: str) -> dict[str, Any]:
    """How far inside is from after backward, and after backward from itself."""
    curves = []
    for name in (optimizer, optimizer, f"{optimizer}_per_layer"):
        model, length = ("llama_9m", 32) if quick else ("llama_60m", 256)
        curves.append(train(mesh, *build(mesh, model, name, length, dtype), 4 if quick else UPDATES))  # fmt: skip
        gc.collect()
    after, again, inside = curves
    row = {"what": f"{optimizer}, {dtype}", "inside": far(inside, after), "again": far(again, after)}  # fmt: skip
    return row | {"passed": row["inside"] <= max(BOUND, 10 * row["again"]), "loss": [after[0], after[-1]]}  # fmt: skip


def peak(mesh: Mesh, model: str, length: int) -> dict[str, Any]:
    """Bytes on the GPU at the peak of three updates, and milliseconds of the last."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    config, engine = build(mesh, model, "adam8bit_per_layer", length, "bfloat16")
    train(mesh, config, engine, 2)
    began = time.perf_counter()
    train(mesh, config, engine, 1)
    row = {"what": f"{model}, 1 x {length}", "peak_bytes": torch.cuda.max_memory_allocated()}
    limit = PEAKS[model, length] * GB.get((model, length), 1e9)
    return row | {"ms": 1e3 * (time.perf_counter() - began), "limit_bytes": limit}


def main() -> int:
    """Compare, measure, print and write; 1 if a curve differs."""
    arguments = flags(__doc__).parse_args()
    mesh = initialise(device=arguments.device)
    rows: list[dict[str, Any]] = []
    has_8bit = importlib.util.find_spec("bitsandbytes") is not None
    try:
        for optimizer in OPTIMIZERS[: 2 if has_8bit else 1]:
            for dtype in ("float32", "bfloat16"):
                rows.append(compared(mesh, optimizer, arguments.quick, dtype))
                write(arguments.out, arguments.device, rows)
        if arguments.device.startswith("cuda") and has_8bit and not arguments.quick:
            for model, length in PEAKS:
                rows.append(peak(mesh, model, length))
                write(arguments.out, arguments.device, rows)
    finally:
        close()
    cells: list[list[object]] = [["after backward against", "inside", "itself", ""]]
    cells += [[r["what"], f"{r['inside']:.1e}", f"{r['again']:.1e}", "" if r["passed"] else "FAILED"] for r in rows if "inside" in r]  # fmt: skip
    print(table(cells))
    cells = [["8-bit per layer", "peak GiB", "limit GiB", "ms an update"]]
    cells += [[r["what"], r["peak_bytes"] / 2**30, r["limit_bytes"] / 2**30, r["ms"]] for r in rows if "peak_bytes" in r]  # fmt: skip
    if len(cells) > 1:
        print(table(cells))
    if not has_8bit:
        print("bitsandbytes is not installed: 8-bit rows were left out")
    return 0 if all(row.get("passed", True) for row in rows) else 1


if __name__ == "__main__":
    finish(main)
