#!/usr/bin/env python
"""The planner against real runs: python benchmarks/plan.py [--cases 350m] [--quick]

Every case runs launcher/pretrain.py for a few updates on this machine's CPU, as real processes, and plans the same flags.
Compared are the planner's total and the peak resident set of a rank up to the last update, without what was
resident before the model existed (interpreter, libraries, data); both in the table, as is their ratio.

glibc is told to map tensors of 64 KiB and more on their own (MALLOC_MMAP_THRESHOLD_), so that freed ones are given back. By
default it keeps them in one heap, whose holes differ from run to run; --heap leaves it so. One thread.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import ROOT, finish, table

UNIT = 2**30
NAMES = ("130m", "350m")
LAYOUTS = ("fsdp 1", "fsdp 2", "zero2 2")


@dataclass(frozen=True)
class Case:
    """One row. layout: engine and ranks. batch: sequences per rank, so that what is measured is above 1 GiB."""

    model: str
    layout: str
    optimizer: str
    checkpointing: str
    batch: int

    @property
    def ranks(self) -> int:
        return int(self.layout[-1])

    @property
    def text(self) -> str:
        return f"{self.model}, {self.layout}, {self.optimizer}"

    def flags(self, steps: int, length: int) -> list[str]:
        """pretrain's and the planner's command line."""
        given: dict[str, object] = {
            "model": f"llama_{self.model}", "optimizer": self.optimizer, "dtype": "float32",
            "activation_checkpointing": self.checkpointing, "linear_path": "factorized",
            "batch_size": self.batch, "total_batch_size": self.batch * self.ranks,
            "max_length": length, "num_training_steps": steps, "warmup_steps": 1,
        }  # fmt: skip
        if self.layout.startswith("zero"):
            given["ds_config"] = ROOT / "ds_configs" / f"{self.layout.split()[0]}.json"
        return [f"--{name}={value}" for name, value in given.items()]


def cases() -> list[Case]:
    """All twelve."""
    found = []
    for model in NAMES:
        for layout in LAYOUTS:
            found.append(Case(model, layout, "adamw", "none", {"130m": 4, "350m": 2}[model]))
            eight = "adam8bit" if layout.startswith("zero") else "adam8bit_per_layer"
            many = {"130m": 24, "350m": 8}[model]
            found.append(Case(model, layout, eight, "block", many if "2" in layout else 8))
    return found


def environment(heap: bool) -> dict[str, str]:
    """Of the processes that are measured."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return os.environ | own | ({} if heap else {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)})


def run(command: list[str], heap: bool = False) -> None:
    """Raises RuntimeError with the end of what a failed command said."""
    done = subprocess.run(command, cwd=ROOT, env=environment(heap), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-3000:]}")


def measured(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Peaks of a real run: up to its last update, and to its end (evaluation, sample and checkpoint included)."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.ranks}"]
        start = [sys.executable, *(launcher if case.ranks > 1 else []), "launcher/pretrain.py"]
        rest = ["--tracker=none", "--eval_tokens=512", "--save_every=0", f"--save_dir={folder}/run"]
        run([*start, *case.flags(arguments.steps, arguments.length), *rest], arguments.heap)
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    peaks = [found["peak_memory_bytes"] for line in lines if "lr" in (found := json.loads(line))]
    before = summary["baseline_memory_bytes"]
    return {
        "updates_bytes": [peak - before for peak in peaks],
        "end_bytes": summary["peak_memory_bytes"] - before,
        "before_bytes": before,
        "formula_of_pretrain_bytes": summary["estimated_memory_bytes"],
    }


def planned(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """What launcher/plan.py says."""
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/plan.json"
        own = [f"--gpus={case.ranks}", "--device=cpu", f"--json={target}"]
        flags = case.flags(arguments.steps, arguments.length)
        run([sys.executable, "launcher/plan.py", *own, *flags])
        content: dict[str, Any] = json.loads(Path(target).read_text())
    return {"bytes": content["bytes"], "total_bytes": content["total_bytes"], "formula_bytes": content["formula_total_bytes"]}  # fmt: skip


def show(rows: list[dict[str, Any]]) -> str:
    """The table."""
    cells: list[list[object]] = [["", "checkpointing", "batch", "measured GiB", "planned GiB", "ratio", "formula GiB", "ratio", "at the end GiB"]]  # fmt: skip
    for row in rows:
        peak = row["measured"]["updates_bytes"][-1]
        plan, formula = row["planned"]["total_bytes"], row["planned"]["formula_bytes"]
        end = row["measured"]["end_bytes"] / UNIT
        cells.append([row["case"], row["checkpointing"], row["batch"], f"{peak / UNIT:.2f}", f"{plan / UNIT:.2f}",
                      f"{plan / peak:.3f}", f"{formula / UNIT:.2f}", f"{formula / peak:.3f}", f"{end:.2f}"])  # fmt: skip
    return table(cells)


def main() -> None:
    """Run, print and write after every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "--cases", default="", help="only those whose name holds this, as '350m, fsdp'"
    )
    parser.add_argument("--steps", type=int, default=2, help="updates of a run")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--heap", action="store_true", help="glibc as it is")
    parser.add_argument(
        "--plan_only", action="store_true", help="keep what was measured, plan anew"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one small case, for a test of this script"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "plan_cpu.json"
    )
    arguments = parser.parse_args()
    known: dict[str, Any] = {}
    if arguments.out.exists():
        known = {row["case"]: row for row in json.loads(arguments.out.read_text())}
    chosen = [case for case in cases() if arguments.cases in case.text]
    if arguments.quick:
        chosen, arguments.length, known = [Case("9m", "fsdp 1", "adamw", "none", 2)], 64, {}
    for case in chosen:
        found = known.get(case.text, {}).get("measured") if arguments.plan_only else None
        found = found or measured(case, arguments)
        known[case.text] = {"case": case.text, "checkpointing": case.checkpointing, "batch": case.batch,
                            "measured": found, "planned": planned(case, arguments)}  # fmt: skip
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        order = {each.text: number for number, each in enumerate(cases())}
        rows = sorted(known.values(), key=lambda row: order.get(row["case"], 99))
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
        print(show(rows), flush=True)


if __name__ == "__main__":
    finish(main)
