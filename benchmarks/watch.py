"""What watching costs: updates of llama_60m with and without metrics, heartbeat, sampling and asynchronous saves.

    python benchmarks/watch.py [--model llama_60m] [--updates 60] [--ranks 1] [--out benchmarks/results/watch_cpu.json]

Whole runs by the command line, in turns: bare (nothing sampled, saved or tracked), watched (the defaults, sampled every 20th
update, Prometheus file), and watched with a checkpoint written beside training every 20th update. Prints medians of an update's
seconds, ratios to bare within a turn with their range, and the share of the wall time that saves stood still for.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
KINDS = {
    "bare": ["--watch_every", "0", "--spike_sigma", "0", "--async_save", "no"],
    "watched": ["--watch_every", "20"],
    "watched and saved": ["--watch_every", "20", "--save_every", "20", "--async_save", "yes"],
}


def run(kind: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One run; median seconds of its updates, and their sum with everything between them."""
    command = [sys.executable]
    if options.ranks > 1:
        command += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={options.ranks}",
        ]
    command += [
        "launcher/pretrain.py", "--model", options.model, "--num_training_steps", str(options.updates),
        "--total_batch_size", "4", "--batch_size", str(4 // options.ranks), "--save_every", "0", "--eval_every", "0",
        "--eval_tokens", "1K", "--tracker", "none", "--save_dir", str(folder), *KINDS[kind],
    ]  # fmt: skip
    if kind != "bare":
        command += ["--prometheus", str(folder.with_suffix(".prom"))]
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    text = (folder / "metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if "loss" in line][4:]
    wall = lines[-1]["time"] - lines[0]["time"]
    return {
        "median": statistics.median(line["seconds"] for line in lines),
        "wall": wall / (len(lines) - 1),
        "saving": sum(line.get("seconds_save", 0.0) for line in lines) / wall,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="llama_demo, few updates: does it run")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.model, options.updates, options.turns = "llama_demo", 25, 1
    turns = []
    for turn in range(options.turns):
        with tempfile.TemporaryDirectory() as folder:
            turns.append(
                {kind: run(kind, options, Path(folder) / kind.replace(" ", "-")) for kind in KINDS}
            )
        print(f"turn {turn + 1} of {options.turns}: {turns[-1]}", flush=True)
    rows = {}
    for kind in KINDS:
        ratios = [turn[kind]["wall"] / turn["bare"]["wall"] for turn in turns]
        rows[kind] = {
            "seconds_per_update": statistics.median(turn[kind]["wall"] for turn in turns),
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "standing_still_for_saves": statistics.median(turn[kind]["saving"] for turn in turns),
        }
        row = rows[kind]
        print(f"{kind:>20} {row['seconds_per_update']:.3f} s an update, {row['ratio']:.3f} of bare ({row['least']:.3f} to {row['most']:.3f})")  # fmt: skip
    if options.out:
        settings = {"model": options.model, "updates": options.updates, "ranks": options.ranks}
        options.out.write_text(
            json.dumps({"settings": settings, "rows": rows, "turns": turns}, indent=1)
        )


if __name__ == "__main__":
    main()
