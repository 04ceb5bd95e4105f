"""What watching costs: updates of llama_60m with and without metrics, heartbeat, agreement, sampling, and saves beside training.

    python benchmarks/watch.py [--model llama_60m] [--updates 120] [--ranks 2] [--out benchmarks/results/watch_cpu.json]

One run. What it does beside training (metrics, events, heartbeat, Prometheus file, bar, signs of life, phases, the collective
in which ranks agree) is switched by update: off, on, on, off, so that whatever else the machine does meets both. On against off
is the median of these fours, with [quarter to quarter]; where the machine is too noisy for it, the time spent inside these functions,
waits for slower ranks among it, says more, and goes into the sum. Every 12th update is sampled (what collectives take), every 24th is
followed by a checkpoint beside training: their cost in seconds is what they, and the updates while the checkpoint is written,
took longer than the median. Prints the share of an update that all this takes at the intervals that a user gets
(--watch_every 100, --save_every 1000), and with ten times as many checkpoints.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from measure import ROOT, table, write

FIRST = 8  # updates that are not counted
SAMPLE, SAVE = 12, 24  # updates between two, here
WATCH_EVERY, SAVE_EVERY = 100, 1000  # and by default


class Switch:
    """Functions that do nothing while ``on`` is false, and the seconds spent in them."""

    on = True
    seconds = 0.0
    _inside = False  # one of them calls another

    def replace(self, owner: Any, name: str, instead: Any = lambda *args, **options: None) -> None:
        """Put a switched function in place of ``owner.name``; ``instead``: what is called while off."""
        inner = getattr(owner, name)

        def switched(*args: Any, **options: Any) -> Any:
            if self._inside or threading.current_thread() is not threading.main_thread():
                return (inner if self.on else instead)(*args, **options)
            self._inside, began = True, time.perf_counter()
            try:
                return (inner if self.on else instead)(*args, **options)
            finally:
                self._inside, self.seconds = False, self.seconds + time.perf_counter() - began

        setattr(owner, name, switched)


def rank(file: str, flags: list[str]) -> int:
    """One rank of the run; what its updates and saves took goes to FILE-RANK."""
    from launcher import pretrain
    from sltrain_dist.train import loop

    switch, updates, saves = Switch(), [], []
    undress(switch, loop)
    step, save = loop._step, loop._save

    def timed_step(run: Any, parts: Any) -> int:
        number, flying = run.step + 1, parts.saves.saver.flying
        switch.on = number % 4 in (2, 3)
        switch.seconds, began = 0.0, time.perf_counter()
        asked = step(run, parts)
        row = {
            "number": number,
            "on": switch.on,
            "seconds": time.perf_counter() - began,
            "inside": switch.seconds,
        }
        updates.append(row | {"flying": flying, "sampled": loop._samples(run) and number % SAMPLE == 2})  # fmt: skip
        return asked

    def timed_save(run: Any, parts: Any) -> None:
        switch.on, began = True, time.perf_counter()
        save(run, parts)
        saves.append({"number": run.step, "seconds": time.perf_counter() - began})

    loop._step, loop._save = timed_step, timed_save
    code = pretrain.main(flags)
    place = os.environ.get("RANK", "0")
    Path(f"{file}-{place}").write_text(json.dumps({"updates": updates, "saves": saves}))
    return code


def undress(switch: Switch, loop: Any) -> None:
    """Switch what a run does beside training."""
    import torch

    from sltrain_dist.train.journal import Journal
    from sltrain_dist.train.run_folder import Records

    for owner, name in ((Journal, "event"), (Journal, "beat"), (Records, "metrics"), (loop.Stopwatch, "begin")):  # fmt: skip
        switch.replace(owner, name)
    for owner, name in ((loop, "_advance"), (loop, "_watch"), (loop.Liveness, "_sign"), (loop.Liveness, "at")):  # fmt: skip
        switch.replace(owner, name)
    switch.replace(Journal, "goodput", lambda journal, trained: 0.0)
    switch.replace(loop.Stopwatch, "end", lambda clock: {})
    switch.replace(loop, "own_peak", lambda mesh: 0)
    switch.replace(loop, "gather_numbers", lambda mesh, own: torch.zeros(mesh.world_size, len(own)))


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The run; what its first rank measured."""
    command = [sys.executable]
    if options.ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]  # fmt: skip
    file = folder / "times"
    command += [
        __file__, "rank", str(file), "--model", options.model, "--num_training_steps", str(options.updates),
        "--total_batch_size", "4", "--batch_size", str(4 // options.ranks), "--save_every", str(SAVE), "--async_save", "yes",
        "--watch_every", str(SAMPLE), "--eval_every", "0", "--eval_tokens", "1K", "--tracker", "none", "--keep_last", "1",
        "--save_dir", str(folder / "run"), "--prometheus", str(folder / "run.prom"),
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(Path(f"{file}-0").read_text())
    return found


def rows(found: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Median update, ratio of on to off, and seconds of a sample and of a save."""
    updates = [x for x in found["updates"] if x["number"] > FIRST]
    plain = [x for x in updates if not x["sampled"] and not x["flying"]]
    median = statistics.median(x["seconds"] for x in plain)
    fours: dict[int, list[dict[str, Any]]] = {}
    for x in plain:
        fours.setdefault((x["number"] - 1) // 4, []).append(x)
    ratios = [
        sum(x["seconds"] for x in four if x["on"]) / sum(x["seconds"] for x in four if not x["on"])
        for four in fours.values()
        if len(four) == 4
    ]
    if len(ratios) < 2:
        raise SystemExit(
            "--updates: too few for two fours without a sample or a checkpoint; give more"
        )
    quarters = statistics.quantiles(ratios, n=4)
    sampled = [x["seconds"] for x in updates if x["sampled"] and not x["flying"]]
    sample = statistics.median(sampled) - median if sampled else 0.0
    beside = [x for x in updates if x["flying"]]
    saves = [x for x in found["saves"] if FIRST < x["number"] < options.updates]
    save = sum(x["seconds"] for x in saves) + sum(x["seconds"] - median for x in beside)
    save /= max(1, len(saves))
    inside = statistics.median(x["inside"] for x in plain if x["on"])
    watch = inside / median
    return {
        "update_seconds": median, "ratio": quarters[1], "ratio_quarters": [quarters[0], quarters[2]], "fours": len(ratios),
        "inside_seconds": inside,
        "sample_seconds": sample, "save_seconds": save, "saves": len(saves), "updates_beside_saves": len(beside),
        "share": watch + sample / WATCH_EVERY / median + save / SAVE_EVERY / median,
        "share_ten_times_the_saves": watch + sample / WATCH_EVERY / median + 10 * save / SAVE_EVERY / median,
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="llama_demo, few updates: does it run")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.model, options.updates = "llama_demo", 60
    if options.ranks not in (1, 2, 4):
        raise SystemExit(f"--ranks {options.ranks}: 1, 2 or 4, which share a batch of 4")
    with tempfile.TemporaryDirectory() as folder:
        found = run(options, Path(folder))
    row = rows(found, options)
    low, high = row["ratio_quarters"]
    print(
        table(
            [
                ["", "cost", "share of an update"],
                ["an update, nothing beside it", f"{row['update_seconds']:.3f} s", ""],
                ["records, heartbeat, agreement, phases: time inside", f"{row['inside_seconds']:.4f} s", f"{row['inside_seconds'] / row['update_seconds']:+.2%}"],
                ["the same, and signs of life: on against off", "", f"{row['ratio'] - 1:+.2%} [{low - 1:+.2%} to {high - 1:+.2%}]"],
                [f"a sample, every {WATCH_EVERY}", f"{row['sample_seconds']:.3f} s", f"{row['sample_seconds'] / WATCH_EVERY / row['update_seconds']:+.3%}"],
                [f"a checkpoint beside training, every {SAVE_EVERY}", f"{row['save_seconds']:.3f} s", f"{row['save_seconds'] / SAVE_EVERY / row['update_seconds']:+.3%}"],
                ["together", "", f"{row['share']:+.2%}"],
                [f"together, a checkpoint every {SAVE_EVERY // 10}", "", f"{row['share_ten_times_the_saves']:+.2%}"],
            ]
        )
    )  # fmt: skip
    settings = {"model": options.model, "updates": options.updates, "ranks": options.ranks}
    write(options.out, "cpu", [row], settings=settings, measured=found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        sys.exit(rank(sys.argv[2], sys.argv[3:]))
    main()
