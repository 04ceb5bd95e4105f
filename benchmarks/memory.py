#!/usr/bin/env python
"""Peak memory of whole training runs: full rank, the reference formula and ours, from the command line to the last update.

    python benchmarks/memory.py --models llama_350m llama_1b --out results/memory_cpu.json
    python benchmarks/memory.py --models llama_7b --rows ours            (16 GiB of memory, 14 GB of disk)

Every row is a process of its own, started as a user starts it (launcher/pretrain.py), three updates of one
sequence of 256 tokens in bfloat16 with activation checkpointing; its figure is the peak resident set that the
kernel reports at its end, the interpreter and its libraries included (/usr/bin/time -v prints the same). ``ours``
also saves, and --resume runs it once more from what was saved, to one update further. The reference formula is
our model with its linears swapped (reference.py), int64 positions in a buffer, and bitsandbytes' Adam8bit for
every tensor in a hook that steps and forgets the gradient, as the authors' per-layer mode does.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import ROOT, about

ROWS = {
    "full_adam": ("full rank, Adam", ["--method", "full", "--optimizer", "adam"]),
    "full": ("full rank, 8-bit Adam per layer", ["--method", "full", "--optimizer", "adam8bit_per_layer"]),
    "reference": ("reference formula, 8-bit Adam per layer", []),
    "ours": ("ours, 8-bit Adam per layer", ["--method", "sltrain", "--optimizer", "adam8bit_per_layer"]),
    "ours_32": ("ours, 8-bit Adam per layer, 32 bits for the vocabulary", ["--method", "sltrain", "--optimizer", "adam8bit_per_layer"]),
}  # fmt: skip
LIMITS = {"llama_350m": 2.2, "llama_1b": 4.5, "llama_7b": 16.0}  # GiB, of ours
GIB = 2**30


def command(row: str, model: str, folder: Path, updates: int, cache: str) -> list[str]:
    """What a row runs."""
    own = ROWS[row][1]
    return [
        sys.executable, str(ROOT / "launcher" / "pretrain.py"), "--model", model, *own,
        "--dtype", "bfloat16", "--master_weights", "none", "--batch_size", "1", "--total_batch_size", "1",
        "--max_length", "256", "--num_training_steps", str(updates), "--activation_checkpointing",
        *(["--embedding_state_bits", "32" if row == "ours_32" else "8"] if "8bit" in " ".join(own) else []),
        "--corpus", "stdlib", "--eval_tokens", "2K", "--tracker", "none", "--save_dir", str(folder),
        "--cache_dir", cache, *(["--grad_clipping", "0"] if "per_layer" not in " ".join(own) else []),
    ]  # fmt: skip


def measure(line: list[str]) -> tuple[int, float, str]:
    """Run it: its peak resident set in bytes, its seconds, and what it printed.

    Raises:
        SystemExit: it failed.
    """
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(line, stdout=printed, stderr=subprocess.STDOUT, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        text = printed.read()
    if process.returncode:
        sys.exit(f"{' '.join(line)}\nexit code {process.returncode}\n{text[-3000:]}")
    return usage.ru_maxrss * 1024, time.perf_counter() - began, text


def run(row: str, model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    if row == "reference":
        line = [sys.executable, __file__, "--alone", model, "--updates", str(arguments.updates)]
        peak, seconds, text = measure([*line, "--cache_dir", arguments.cache_dir])
        return {"peak_bytes": peak, "seconds": seconds, "losses": json.loads(text.splitlines()[-1])}
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        line = command(row, model, folder, arguments.updates, arguments.cache_dir)
        peak, seconds, text = measure(line)
        found: dict[str, Any] = {"peak_bytes": peak, "seconds": seconds, "losses": losses(folder)}
        if match := re.search(r"the estimate was ([\d.]+ [GM]iB)", text):
            found["estimate"] = match[1]
        if arguments.resume and row.startswith("ours"):
            line = command(row, model, folder, arguments.updates + 1, arguments.cache_dir)
            peak, seconds, text = measure([*line, "--continue_from", "auto"])
            assert f"at update {arguments.updates}" in text, text[-2000:]
            found |= {"resume_peak_bytes": peak, "resume_seconds": seconds}
            found["losses"] = losses(folder)
        return found
    finally:
        shutil.rmtree(folder)


def losses(folder: Path) -> list[float]:
    """Of every update."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def alone(model_name: str, updates: int, cache_dir: str) -> None:
    """The reference formula's row, in this process; prints the losses."""
    import bitsandbytes
    import torch
    from reference import use_reference
    from step import filled

    from sltrain_dist.model.backends import resolve_attention, resolve_norm
    from sltrain_dist.train.build import make_model
    from sltrain_dist.train.settings import resolve

    given = {
        "model": model_name, "method": "sltrain", "support": "uniform", "linear_path": "composed", "batch_size": 1,
        "total_batch_size": 1, "dtype": "bfloat16", "activation_checkpointing": "block", "cache_dir": cache_dir,
    }  # fmt: skip
    config = resolve([f"--{name}={value}" for name, value in given.items()], 1)
    device, dtype = torch.device("cpu"), torch.bfloat16
    attention = resolve_attention("auto", device, dtype, config.model.head_dim)
    norm = resolve_norm("auto", device, dtype, config.model.hidden_size)
    blank = make_model(config, attention, norm, device="meta", dtype=dtype)
    model: Any = filled(blank, device, config.method.seed)
    use_reference(model)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        optimizer = bitsandbytes.optim.Adam8bit([parameter], lr=config.optimizer.lr)

        def step(tensor: torch.Tensor, optimizer: Any = optimizer) -> None:
            optimizer.step()
            tensor.grad = None

        parameter.register_post_accumulate_grad_hook(step)
    found = []
    for number in range(updates):
        tokens = torch.randint(8192, (1, 257), generator=torch.Generator().manual_seed(number))
        loss = model(tokens[:, :-1], tokens[:, 1:]) / 256
        loss.backward()
        found.append(loss.item())
    print(json.dumps(found))


def table(found: dict[str, Any]) -> str:
    """Rows of GiB, with ratios to full rank under the same optimizer and under Adam."""
    lines = [
        f"{'model':<11} {'row':<58} {'peak GiB':>8} {'of Adam':>8} {'of full':>8} {'resumed':>8} {'limit':>6}"
    ]
    for name, entry in found.items():
        model, row = name.split("/")
        peak = entry["peak_bytes"]

        def ratio(other: str, model: str = model, peak: int = peak) -> str:
            base = found.get(f"{model}/{other}")
            return f"{peak / base['peak_bytes']:.2f}" if base else "-"

        resumed = entry.get("resume_peak_bytes")
        limit = f"{LIMITS[model]}" if row == "ours" and model in LIMITS else ""
        lines.append(
            f"{model:<11} {ROWS[row][0]:<58} {peak / GIB:8.2f} {ratio('full_adam'):>8} {ratio('full'):>8} "
            f"{f'{resumed / GIB:.2f}' if resumed else '-':>8} {limit:>6}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what is asked for, print the table of all that the file has."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["llama_350m", "llama_1b"])
    parser.add_argument("--rows", nargs="+", default=["full_adam", "full", "reference", "ours"], choices=tuple(ROWS))  # fmt: skip
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--resume", action="store_true", help="ours once more, from its checkpoint")
    parser.add_argument("--folder", help="of the runs, deleted after each [the system's temporary one]")  # fmt: skip
    parser.add_argument("--cache_dir", default="~/.cache/sltrain_dist")
    parser.add_argument("--out", type=Path, help="JSON; rows that it has and that are not measured now are kept")  # fmt: skip
    parser.add_argument("--alone", metavar="MODEL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        alone(arguments.alone, arguments.updates, arguments.cache_dir)
        return
    found: dict[str, Any] = {}
    if arguments.out and arguments.out.exists():
        found = json.loads(arguments.out.read_text())["rows"]
    for model in arguments.models:
        for row in arguments.rows:
            entry = run(row, model, arguments) | {"environment": about("cpu")}
            found[f"{model}/{row}"] = entry
            print(f"{model} {ROWS[row][0]}: {entry['peak_bytes'] / GIB:.2f} GiB, {entry['seconds']:.0f} s, losses {entry['losses']}", flush=True)  # fmt: skip
            if arguments.out:
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps({"rows": found}, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
