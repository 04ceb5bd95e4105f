"""What watching costs: updates of llama_60m with and without metrics, heartbeat, sampling and asynchronous saves.

    python benchmarks/watch.py [--model llama_60m] [--updates 60] [--ranks 1] [--out benchmarks/results/watch_cpu.json]

Whole runs in turns: bare (no metrics, events, heartbeat, bar, signs of life, agreement or clocks: they are replaced by nothing),
watched (the defaults, sampled every 20th update, with a Prometheus file), and watched with a checkpoint written beside training
every 20th update. Prints medians of the wall time from update to update, and ratios to bare within a turn with their range.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
KINDS = {
    "bare": ["--watch_every", "0", "--spike_sigma", "0", "--async_save", "no"],
    "watched": ["--watch_every", "20"],
    "watched and saved": ["--watch_every", "20", "--save_every", "20", "--async_save", "yes"],
}
FIRST = 4  # updates that are not counted


def rank(arguments: list[str]) -> int:
    """One rank of a run: KIND FILE FLAGS; the times at which its updates began go to FILE."""
    kind, file, *flags = arguments
    from launcher import pretrain
    from sltrain_dist.train import loop

    if kind == "bare":
        _undress(loop)
    inner, times = loop.update, []

    def timed(*args: Any, **options: Any) -> Any:
        times.append(time.perf_counter())
        return inner(*args, **options)

    loop.update = timed
    code = pretrain.main(flags)
    Path(file).write_text(json.dumps(times))
    return code


def _undress(loop: Any) -> None:
    """Take away what a run does beside training."""
    import torch

    from sltrain_dist.train.journal import Journal
    from sltrain_dist.train.run_folder import Records

    def nothing(*args: Any, **options: Any) -> None:
        return None

    Journal.event = Journal.beat = Records.metrics = nothing  # type: ignore[assignment,method-assign]
    Journal.goodput = lambda self, trained: 0.0  # type: ignore[method-assign]
    loop.Liveness.__enter__ = lambda self: self
    loop.Liveness.__exit__ = nothing
    loop.Stopwatch.begin, loop.Stopwatch.end = nothing, lambda self: {}
    loop._advance = loop._watch = nothing
    loop.own_peak = lambda mesh: 0
    loop.gather_numbers = lambda mesh, numbers: torch.zeros(1, len(numbers))


def run(kind: str, options: argparse.Namespace, folder: Path) -> float:
    """One run; median seconds from update to update, saves and records among them."""
    command = [sys.executable]
    if options.ranks > 1:
        command += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={options.ranks}",
        ]
    times = folder / "times.json"
    command += [
        __file__, "rank", kind, str(times), "--model", options.model, "--num_training_steps", str(options.updates),
        "--total_batch_size", "4", "--batch_size", str(4 // options.ranks), "--save_every", "0", "--eval_every", "0",
        "--eval_tokens", "1K", "--tracker", "none", "--save_dir", str(folder / "run"), *KINDS[kind],
    ]  # fmt: skip
    if kind != "bare":
        command += ["--prometheus", str(folder / "run.prom")]
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    began = json.loads(times.read_text())[FIRST:]
    return float(began[-1] - began[0]) / (len(began) - 1)


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
        turns.append({})
        for kind in KINDS:
            with tempfile.TemporaryDirectory() as folder:
                turns[-1][kind] = run(kind, options, Path(folder))
        print(f"turn {turn + 1} of {options.turns}, seconds an update: {turns[-1]}", flush=True)
    rows = {}
    for kind in KINDS:
        ratios = [turn[kind] / turn["bare"] for turn in turns]
        rows[kind] = {
            "seconds_per_update": statistics.median(turn[kind] for turn in turns),
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
        }
        row = rows[kind]
        print(f"{kind:>20} {row['seconds_per_update']:.3f} s an update, {row['ratio']:.3f} of bare ({row['least']:.3f} to {row['most']:.3f})")  # fmt: skip
    if options.out:
        settings = {"model": options.model, "updates": options.updates, "ranks": options.ranks}
        document = {"settings": settings, "rows": rows, "turns": turns}
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        sys.exit(rank(sys.argv[2:]))
    main()
