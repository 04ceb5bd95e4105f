#!/usr/bin/env python
"""Tokens/s that the loader delivers against what a training step consumes, and how long a step waits.

    python benchmarks/data.py --model llama_60m --corpus my_texts/

The text is tokenised first (not part of any figure); then batches are taken as the training loop takes them:
from the packed index, micro-batches stacked and moved to the device. "delivered" is the loader alone, as fast as it
can; "consumed" and "wait" are of training steps (ours, see step.py) that take their batches from it.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import chart, finish, flags, table, wait, write
from step import Trainer

from sltrain_dist.config import TrainConfig
from sltrain_dist.data import open_data, prepare_data
from sltrain_dist.train.settings import resolve
from sltrain_dist.train.update import on_device


def configure(arguments: argparse.Namespace, workers: int) -> TrainConfig:
    """The preset on the corpus; one update is one micro-batch."""
    given = {
        "model": arguments.model, "corpus": arguments.corpus, "cache_dir": arguments.cache_dir,
        "batch_size": arguments.batch_size, "total_batch_size": arguments.batch_size,
        "max_length": arguments.length, "workers": workers,
    }  # fmt: skip
    return resolve([f"--{name}={value}" for name, value in given.items()], 1)


def batches(config: TrainConfig) -> Iterator[list[Any]]:
    """Updates of an opened corpus, from the first."""
    size = config.engine.batch_size
    opened = open_data(
        config.data, config.model.vocab_size, global_batch=size, micro_batch=size, prepare=False
    )
    return opened.updates(0)


def delivered(config: TrainConfig, device: str, seconds: float) -> float:
    """Tokens/s of the loader alone."""
    updates, count = batches(config), 0
    on_device(next(updates), torch.device(device))  # processes start here
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or count < 3:
        on_device(next(updates), torch.device(device))
        count += 1
    wait(device)
    tokens = config.engine.batch_size * config.data.sequence_length
    return count * tokens / (time.perf_counter() - began)


def trained(trainer: Trainer, config: TrainConfig, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of every step, and of those the seconds it waited for its batch."""
    updates, device = batches(config), trainer.device
    steps_taken, waits = [], []
    for number in range(steps + 2):
        wait(device)
        began = time.perf_counter()
        ((trainer.tokens, trainer.labels),) = on_device(next(updates), torch.device(device))
        waited = time.perf_counter() - began
        trainer.step()
        wait(device)
        if number >= 2:
            waits.append(waited)
            steps_taken.append(time.perf_counter() - began)
    return steps_taken, waits


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row per number of loader processes."""
    prepare_data(configure(arguments, 0).data, configure(arguments, 0).model.vocab_size)
    trainer = Trainer("ours", arguments, arguments.dtype)
    tokens = arguments.batch_size * arguments.length
    for workers in arguments.workers:
        config = configure(arguments, workers)
        rate = delivered(config, arguments.device, arguments.seconds)
        steps, waits = trained(trainer, config, arguments.steps)
        yield {
            "model": config.model.name, "dtype": arguments.dtype, "workers": workers, "tokens_per_step": tokens,
            "delivered_tokens_per_second": rate, "consumed_tokens_per_second": tokens / median(steps),
            "delivered_to_consumed": rate * median(steps) / tokens,
            "wait_ms": [1e3 * part for part in (median(waits), min(waits), max(waits))],
            "step_ms": 1e3 * median(steps), "wait_share": sum(waits) / sum(steps),
        }  # fmt: skip


def parse() -> argparse.Namespace:
    """The command line, with what step.Trainer reads."""
    parser = flags(__doc__)
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--corpus", default="stdlib", help="as of pretrain.py, on this machine")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3.0, help="of the loader alone")
    parser.add_argument("--cache_dir", help="where the index is kept [a temporary folder]")
    parser.set_defaults(support="fan_in", linear_path="auto", compile="none")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.model, arguments.batch_size, arguments.length = "llama_demo", 2, 32
        arguments.steps, arguments.seconds = 2, 0.1
    return arguments


def main() -> None:
    """Measure, print and write."""
    arguments = parse()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        arguments.cache_dir = arguments.cache_dir or folder
        if arguments.quick and arguments.corpus == "stdlib":  # a minute of tokenising
            small = Path(folder, "small.txt")
            small.write_text(Path(argparse.__file__).read_text())
            arguments.corpus = str(small)
        for row in measure(arguments):
            rows.append(row)
            write(arguments.out, arguments.device, rows)
    head = ["workers", "delivered tokens/s", "consumed tokens/s", "ratio", "wait ms", "of the step"]
    cells: list[list[object]] = [[*head]]
    for row in rows:
        rates = [f"{row[f'{name}_tokens_per_second']:,.0f}" for name in ("delivered", "consumed")]
        times = "{:.2f} [{:.2f} to {:.2f}]".format(*row["wait_ms"])
        cells.append([row["workers"], *rates, f"{row['delivered_to_consumed']:,.0f}", times,
                      f"{row['wait_share']:.2%}"])  # fmt: skip
    print(
        f"{arguments.model}, {arguments.dtype}, {rows[0]['tokens_per_step']} tokens a step, {arguments.device}"
    )
    print(table(cells))
    groups = {
        f"{row['workers']} loader processes": {"wait": row["wait_ms"], "step": [row["step_ms"]] * 3}
        for row in rows
    }
    chart(arguments.out, f"Waiting for data, {arguments.model}, {arguments.device}", "ms", groups)


if __name__ == "__main__":
    finish(main)
