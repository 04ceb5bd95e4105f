#!/usr/bin/env python
"""A whole training step of a preset: full rank, the reference formula, and ours, with the path auto chooses.

    python benchmarks/step.py --model llama_60m                      tokens/s, peak memory, shares of time
    python benchmarks/step.py --model llama_1b --dtype bfloat16 --device cuda --compile

A step is forward, loss, backward and torch's fused AdamW on one batch of random tokens (16 x 256 by default, 4 x 256 on a CPU); in
bfloat16 weights and optimizer states are bfloat16 too, as the reference trains. All three are our model: they
differ in their linears alone. Speed: the methods take turns in one process; where they do not fit together, one
after the other. Peak memory: each method alone, on a CPU in a process of its own (the resident peak over steps,
after that of initialisation was reset). Shares: extra steps with clocks around the parts, never compiled.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import clocks
import torch
from clocks import PARTS
from measure import chart, finish, flags, paired, ratio, table, wait, write
from reference import use_reference
from torch import nn

from sltrain_dist.config import TrainConfig
from sltrain_dist.model.backends import resolve_attention, resolve_norm
from sltrain_dist.model.flops import model_flops_per_token
from sltrain_dist.params import collect_specs
from sltrain_dist.train.build import make_model
from sltrain_dist.train.linear_paths import decide
from sltrain_dist.train.settings import resolve
from sltrain_dist.train.summary import peak_flops

METHODS = {"full": "full rank", "reference": "reference formula", "ours": "ours"}


class Trainer:
    """A model of one method on the device, its optimizer and one batch."""

    def __init__(self, method: str, arguments: argparse.Namespace, dtype: str) -> None:
        self.device = arguments.device
        self.config = configure(method, arguments, dtype)
        model, config = self.config.model, self.config
        device, format_ = torch.device(self.device), getattr(torch, dtype)
        attention = resolve_attention("auto", device, format_, model.head_dim)
        norm = resolve_norm("auto", device, format_, model.hidden_size)
        plain = replace(config, compile="none")
        blank = make_model(plain, attention, norm, device="meta", dtype=format_)
        paths = decide(plain, blank, device, None)
        paths.apply(blank)
        self.paths = paths.describe(blank) if method == "ours" else ""
        self.model: Any = filled(blank, device, config.method.seed)
        if method == "reference":
            use_reference(self.model)
        if arguments.compile != "none":
            for block in self.model.blocks:
                block.compile(mode=arguments.compile)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
        shape = (arguments.batch_size, arguments.length)
        self.tokens = torch.randint(model.vocab_size, shape, device=device)
        self.labels = torch.randint(model.vocab_size, shape, device=device)

    def backward(self) -> None:
        """Gradients of the batch's mean loss."""
        (self.model(self.tokens, self.labels) / self.labels.numel()).backward()

    def shares(self, turns: int) -> dict[str, float]:
        """Where a step's time goes; afterwards the model is not for timing."""
        return clocks.shares(self.model, self.backward, self.update, self.device, turns)

    def update(self) -> None:
        """Move the weights."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        """One training step."""
        self.backward()
        self.update()


def configure(method: str, arguments: argparse.Namespace, dtype: str) -> TrainConfig:
    """The preset with its recipe; the reference's support is uniform."""
    given = {
        "model": arguments.model, "dtype": dtype, "master_weights": "none",
        "batch_size": arguments.batch_size, "total_batch_size": arguments.batch_size,
        "max_length": arguments.length, "cache_dir": arguments.cache_dir,
        "method": "full" if method == "full" else "sltrain",
        "support": "uniform" if method == "reference" else arguments.support,
    }  # fmt: skip
    if method == "ours":
        given["linear_path"] = arguments.linear_path
    if method == "reference":
        given["linear_path"] = "composed"  # it is swapped out: nothing to choose
    return resolve([f"--{name}={value}" for name, value in given.items()], 1)


def filled(model: nn.Module, device: torch.device, seed: int) -> nn.Module:
    """The model off the meta device, with its initial values."""
    specs = collect_specs(model)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            first = specs[name].initial.flat(seed, name, 0, parameter.numel(), device)
            parameter.copy_(first.view_as(parameter))
    return model


def alone(method: str, arguments: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Peak memory of a method's steps, nothing else built; in this process."""
    before = resident() if arguments.device == "cpu" else torch.cuda.memory_allocated()
    trainer = Trainer(method, arguments, dtype)
    trainer.step()  # the optimizer's states are made
    wait(arguments.device)
    if trainer.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:  # what initialisation left is given back; "5" sets the peak to what is resident now
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    trainer.step()
    wait(arguments.device)
    peak = torch.cuda.max_memory_allocated() if trainer.device == "cuda" else resident("VmHWM")
    if trainer.device == "cuda":  # what an earlier method has not given back is not this one's
        peak, before = peak - before, 0
    counts = [p.numel() for p in trainer.model.parameters() if p.requires_grad]
    return {"peak_bytes": peak, "bytes_before": before, "parameters": sum(counts), "paths": trainer.paths}  # fmt: skip


def resident(field: str = "VmRSS") -> int:
    """Bytes of RAM of this process, now or (VmHWM) at its peak."""
    text = Path("/proc/self/status").read_text()
    line = next(line for line in text.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def memory(method: str, arguments: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """`alone`, on a CPU in a child of its own."""
    if arguments.device == "cuda":
        found = alone(method, arguments, dtype)
        gc.collect()
        torch.cuda.empty_cache()
        return found
    command = [sys.executable, __file__, *sys.argv[1:], "--cache_dir", arguments.cache_dir,
               "--dtype", dtype, "--alone", method]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"peak memory of {method}: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def speeds(
    arguments: argparse.Namespace, dtype: str, together: bool
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Seconds per turn and shares of every method."""
    seconds: dict[str, list[float]] = {}
    parts: dict[str, dict[str, float]] = {}
    groups = [arguments.methods] if together else [[method] for method in arguments.methods]
    for group in groups:
        trainers = {method: Trainer(method, arguments, dtype) for method in group}
        calls = {method: trainer.step for method, trainer in trainers.items()}
        seconds |= paired(
            calls, arguments.device, arguments.turns, warm_ups=1, limit=arguments.seconds
        )
        if arguments.compile == "none":
            parts |= {m: t.shares(2) for m, t in trainers.items()}
        del trainers, calls
        gc.collect()
    return seconds, parts


def fits(peaks: list[int], device: str) -> bool:
    """Whether all methods can be alive at once, with some room left."""
    if device == "cuda":
        return sum(peaks) < 0.9 * torch.cuda.mem_get_info()[0]
    text = Path("/proc/meminfo").read_text()
    free = next(int(line.split()[1]) for line in text.splitlines() if "MemAvailable" in line)
    return sum(peaks) < 0.8 * free * 1024


def measure(arguments: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    """A row per method."""
    peaks = {method: memory(method, arguments, dtype) for method in arguments.methods}
    together = fits([found["peak_bytes"] for found in peaks.values()], arguments.device)
    seconds, parts = speeds(arguments, dtype, together)
    tokens = arguments.batch_size * arguments.length
    rows = []
    for method in arguments.methods:
        taken = seconds[method]
        config = configure(method, arguments, dtype)
        flops = model_flops_per_token(config.model, config.method, arguments.length).total
        rate, peak = tokens / median(taken), peak_flops() if arguments.device == "cuda" else None
        row: dict[str, Any] = {
            "model": config.model.name, "method": method, "dtype": dtype, "batch_size": arguments.batch_size,
            "length": arguments.length, "compile": arguments.compile, "paired": together, "turns": len(taken),
            "step_ms": 1e3 * median(taken), "tokens_per_second": rate,
            "tokens_per_second_spread": [tokens / max(taken), tokens / min(taken)],
            "mfu": rate * flops / peak if peak else None, "shares": parts.get(method), **peaks[method],
        }  # fmt: skip
        for other in ("full", "reference"):
            if other in seconds:
                count = min(len(taken), len(seconds[other]))
                row[f"faster_than_{other}"] = ratio(seconds[other][:count], taken[:count])
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """The table."""
    cells: list[list[object]] = [["", "dtype", "tokens/s", "step ms", "faster than full rank", "than reference",
                                  "peak MiB", "above start", "MFU", *PARTS]]  # fmt: skip
    for row in rows:
        ratios = [
            f"{v[0]:.2f} [{v[1]:.2f} to {v[2]:.2f}]"
            if (v := row.get(f"faster_than_{name}"))
            else ""
            for name in ("full", "reference")
        ]
        sizes = (row["peak_bytes"], row["peak_bytes"] - row["bytes_before"])
        percent = [f"{row['shares'][part]:.0%}" if row["shares"] else "" for part in PARTS]
        cells.append([
            METHODS[row["method"]], row["dtype"], f"{row['tokens_per_second']:,.0f}", f"{row['step_ms']:.1f}", *ratios,
            *(f"{size / 2**20:,.0f}" for size in sizes), f"{row['mfu']:.1%}" if row["mfu"] else "", *percent,
        ])  # fmt: skip
    return table(cells)


def picture(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Speed and peak memory, each against full rank."""
    groups: dict[str, dict[str, list[float]]] = {}
    full = {row["dtype"]: row for row in rows if row["method"] == "full"}
    for row in rows:
        if row["dtype"] in full:
            name, dtype = METHODS[row["method"]], row["dtype"]
            peak = row["peak_bytes"] / full[dtype]["peak_bytes"]
            groups.setdefault(f"tokens/s\n{dtype}", {})[name] = row["faster_than_full"]
            groups.setdefault(f"peak memory\n{dtype}", {})[name] = [peak, peak, peak]
    tokens = f"{arguments.batch_size} x {arguments.length} tokens"
    title = f"Training step of {arguments.model}, {tokens}, {arguments.device}"
    chart(arguments.out, title, "relative to full rank", groups, line=1.0)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = flags(__doc__)
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch_size", type=int, help="sequences; default 16, on a CPU 4")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--support", choices=("fan_in", "uniform", "block"), default="fan_in")
    parser.add_argument("--linear_path", choices=("auto", "composed", "factorized"), default="auto")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        default="none",
        choices=("none", "default", "reduce-overhead", "max-autotune"),
        help="torch.compile every block, in this mode",
    )
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="for the turns of a dtype, about"
    )
    parser.add_argument("--cache_dir", help=argparse.SUPPRESS)
    parser.add_argument("--alone", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.batch_size is None:
        arguments.batch_size = 4 if arguments.device == "cpu" else 16
    if arguments.quick:
        arguments.model, arguments.turns = "llama_demo", 2
        arguments.batch_size, arguments.length = 2, 32
    return arguments


def main() -> None:
    """Measure, print and write."""
    arguments = parse()
    if arguments.alone:
        print(json.dumps(alone(arguments.alone, arguments, arguments.dtype[0])))
        return
    rows: list[dict[str, Any]] = []
    # The choice of paths is made anew, not taken from what older kernels timed.
    with tempfile.TemporaryDirectory() as folder:
        arguments.cache_dir = arguments.cache_dir or folder
        for dtype in arguments.dtype:
            rows += measure(arguments, dtype)
            print(show(rows), flush=True)
            write(arguments.out, arguments.device, rows)
    for row in rows:
        if row["paths"]:
            print(f"{row['dtype']}: {row['paths']}")
    picture(arguments, rows)


if __name__ == "__main__":
    finish(main)
