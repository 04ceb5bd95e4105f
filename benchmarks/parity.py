#!/usr/bin/env python
"""Does updating inside backward, and keeping moments in 8 bits, change training? 100 updates of llama_9m, by the command line.

    python benchmarks/parity.py --out results/parity_cpu.json

On 1, 2 and 4 gloo ranks, FSDP2 and tensor parallel 2, three runs each, one batch after another the same: AdamW with 32-bit
moments, 8-bit stepped after backward, 8-bit stepped inside. Then the last is saved every 20 updates, one of its ranks is killed
after update 40, and it goes on twice from its checkpoint: on the same ranks, which must repeat the curve to the bit, and on
four with tensor parallel 2, where moments are encoded anew. Prints the largest differences; exit code 1 where one is over
its limit.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import ROOT, about

LAYOUTS = {"1": (1, 1), "2": (2, 1), "4": (4, 1), "2, tensor parallel 2": (2, 2), "4, tensor parallel 2": (4, 2)}  # fmt: skip
OPTIMIZERS = ("adamw", "adamw8bit", "adamw8bit_per_layer")
INSIDE, CODED = 1e-6, 1e-2  # limits, relative: inside against after backward, 8 bits against 32
SAVE_EVERY, KILL_AFTER = 20, 40


def command(optimizer: str, layout: str, folder: Path, updates: int, *more: str) -> list[str]:
    """One run."""
    ranks, tp = LAYOUTS[layout]
    batch = 4
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
        str(ROOT / "launcher" / "pretrain.py"), "--model", "llama_9m", "--optimizer", optimizer, "--lr", "1e-3",
        "--tensor_parallel", str(tp), "--num_training_steps", str(updates), "--warmup_steps", "10", "--total_batch_size", str(batch),
        "--batch_size", str(batch * tp // ranks), "--max_length", "64", "--dtype", "float32", "--grad_clipping", "0",
        "--eval_tokens", "1K", "--save_every", "0", "--eval_every", "0", "--tracker", "none", "--save_dir", str(folder), *more,
    ]  # fmt: skip


def run(line: list[str]) -> None:
    """To its end.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment())
    if done.returncode:
        sys.exit(f"{' '.join(line)}\nexit code {done.returncode}\n{done.stderr[-3000:]}")


def environment() -> dict[str, str]:
    """Ranks share the cores without spinning."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def losses(folder: Path) -> list[float]:
    """Of every update."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def difference(one: list[float], other: list[float]) -> float:
    """Largest, relative."""
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def killed(folder: Path, updates: int) -> None:
    """Train on two ranks and kill one of them as soon as the checkpoint of update KILL_AFTER stands."""
    line = command(OPTIMIZERS[2], "2", folder, updates, "--save_every", str(SAVE_EVERY))
    process = subprocess.Popen(
        line,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
    )
    while not (folder / f"step_{KILL_AFTER}").exists():
        if process.poll() is not None:
            sys.exit("the run that was to be killed ended by itself")
        time.sleep(0.05)
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "pretrain.py"], capture_output=True, text=True
    )
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
    process.wait()


def main() -> int:
    """Run all, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=100, help=f"more than {KILL_AFTER}")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=tuple(LAYOUTS))
    parser.add_argument("--out", type=Path, help="JSON; rows of other layouts that it has are kept")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    rows: list[dict[str, Any]] = []
    good = True

    def note(what: str, value: float, limit: float) -> None:
        nonlocal good
        good = good and value <= limit
        rows.append({"what": what, "difference": value, "limit": limit})
        print(f"{what:<66} {value:9.1e}  (at most {limit:g})", flush=True)

    try:
        for layout in arguments.layouts:
            curves = []
            for optimizer in OPTIMIZERS:
                place = folder / f"{layout} {optimizer}"
                run(command(optimizer, layout, place, arguments.updates))
                curves.append(losses(place))
            plain, after, inside = curves
            note(f"ranks {layout}: 8-bit inside against after backward", difference(inside, after), INSIDE)  # fmt: skip
            note(f"ranks {layout}: 8-bit against 32-bit moments", difference(after, plain), CODED)
            print(f"  loss {plain[0]:.3f} -> {plain[-1]:.3f}, 8-bit {after[-1]:.3f}", flush=True)
        whole = folder / f"2 {OPTIMIZERS[2]}"
        if whole.exists():
            place = folder / "killed"
            killed(place, arguments.updates)
            shutil.copytree(place, folder / "other")
            for target, layout, what, limit in (
                (place, "2", "killed after update 40, the same ranks go on", 0.0),
                (folder / "other", "4, tensor parallel 2", "killed after update 40, ranks 4, tensor parallel 2 go on", CODED),
            ):  # fmt: skip
                source = ["--continue_from", str(target / f"step_{KILL_AFTER}")]
                run(command(OPTIMIZERS[2], layout, target, arguments.updates, *source))
                note(what, difference(losses(target), losses(whole)), limit)
    finally:
        shutil.rmtree(folder)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
        kept = [row for row in known if row["what"] not in {new["what"] for new in rows}]
        document = {"about": about("cpu"), "updates": arguments.updates, "rows": kept + rows}
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
