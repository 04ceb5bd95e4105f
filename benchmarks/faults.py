"""A fault campaign: one run after another is killed, stopped, starved and lied to at random, and must end on its curve.

    python benchmarks/faults.py [--faults 200] [--seed 0] [--out benchmarks/results/faults_cpu.json]

A run of two ranks trains a tiny model under torchrun with restarts. At random moments, drawn from the seed, one of the
faults in FAULTS is injected; where the launcher itself gives up (no restarts left, an interruption), it is started again
with the same command, as a job that is requeued would be. A run counts as lost where that does not end with the last
update; its losses must then equal those of the run that nobody disturbed, bit for bit (a difference is a silent
divergence). Prints a table of faults by kind: injected, survived, and what the run itself reported.

Disks are file systems in memory, so this needs root; kinds that this machine cannot inject are skipped with a reason.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

from tests.launcher import tiny  # noqa: E402
from tests.launcher.processes import FAULTY, rank_process, torchrun  # noqa: E402

UPDATES = 240  # of a run
TIMEOUT = 6.0  # seconds a collective may take
RANKS = 2
BAD = "5%40"  # batches whose losses are not finite: number 5 of every 40


@dataclass
class Run:
    """A run under fire."""

    folder: Path
    inputs: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """What a user would start."""
        settings = {
            "num_training_steps": UPDATES, "save_every": 5, "eval_every": 0, "timeout": TIMEOUT,
            "continue_from": "auto", "max_skips": 10, "watch_every": 0, "total_batch_size": 4,
        }  # fmt: skip
        line = tiny.flags(self.inputs, self.folder, **settings)
        return torchrun(RANKS, "--max_restarts=3", FAULTY, *line)

    def start(self) -> None:
        """Start it, or start it again."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "FAULTY_NAN": BAD}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.command()], cwd=REPOSITORY, env=environment, stdout=log, stderr=log
            )  # fmt: skip

    def state(self) -> dict[str, object]:
        """Its heartbeat."""
        try:
            document: dict[str, object] = json.loads((self.folder / "heartbeat.json").read_text())
        except (OSError, ValueError):
            return {}
        return document

    def lines(self) -> int:
        """Lines of metrics written."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def losses(self) -> dict[int, float]:
        """By update, none twice."""
        lines = [line for line in tiny.metrics(self.folder) if "loss" in line]
        assert len({line["step"] for line in lines}) == len(lines), "an update stands twice"
        return tiny.losses(self.folder)

    def newest(self) -> Path | None:
        """The newest checkpoint."""
        found = sorted(self.folder.glob("step_*[0-9]"), key=lambda path: int(path.name[5:]))
        return found[-1] if found else None

    def signal(self, rank: int, number: int) -> bool:
        """Send a signal to a rank; False where it is not there just now."""
        try:
            os.kill(rank_process(rank, self.folder), number)
        except (AssertionError, ProcessLookupError):
            time.sleep(0.2)
            return False
        return True


def _kill(run: Run, chance: random.Random) -> bool:
    return run.signal(chance.randrange(RANKS), signal.SIGKILL)


def _terminate(run: Run, chance: random.Random) -> bool:
    return run.signal(chance.randrange(RANKS), chance.choice([signal.SIGTERM, signal.SIGUSR1]))


def _stop(run: Run, chance: random.Random) -> bool:
    return run.signal(chance.randrange(RANKS), signal.SIGSTOP)


def _launcher(run: Run, chance: random.Random) -> bool:
    assert run.process is not None
    run.process.send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM]))
    return True


def _damage(run: Run, change: Callable[[bytearray], bytearray], chance: random.Random) -> bool:
    """Change a file of the newest checkpoint and kill a rank, so that the restart must read it."""
    folder = run.newest()
    try:
        assert folder is not None
        path = chance.choice(sorted(folder.iterdir()))
        path.write_bytes(change(bytearray(path.read_bytes())))
    except (AssertionError, OSError, IndexError):
        return False  # none yet, or just then replaced by a newer one
    _kill(run, chance)
    return True


def _tear(run: Run, chance: random.Random) -> bool:
    return _damage(run, lambda data: data[: chance.randrange(max(1, len(data)))], chance)


def _flip(run: Run, chance: random.Random) -> bool:
    def flipped(data: bytearray) -> bytearray:
        if data:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        return data

    return _damage(run, flipped, chance)


def _fill(run: Run, chance: random.Random) -> bool:
    """No room for some seconds, saves among them."""
    ballast = run.folder.parent / "ballast"
    try:
        with ballast.open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
    except OSError:
        pass
    time.sleep(chance.uniform(0.5, 4.0))
    ballast.unlink(missing_ok=True)
    return True


FAULTS: dict[
    str, tuple[int, Callable[[Run, random.Random], bool]]
] = {  # weight, and whether it struck
    "SIGKILL of a rank": (5, _kill),
    "SIGTERM or SIGUSR1 to a rank": (4, _terminate),
    "SIGSTOP of a rank": (2, _stop),
    "SIGKILL or SIGTERM of the launcher": (2, _launcher),
    "torn checkpoint file": (2, _tear),
    "flipped bit in a checkpoint file": (2, _flip),
    "full disk": (3, _fill),
}


def undisturbed(run: Run) -> dict[int, float]:
    """The curve that nobody disturbs."""
    run.start()
    assert run.process is not None
    if run.process.wait(1800):
        raise SystemExit(run.log.read_text()[-3000:])
    return run.losses()


def disturb(run: Run, chance: random.Random, left: int, counts: Counter[str]) -> int:
    """Train one run to its end under fire; returns the number of starts that took."""
    kinds = list(FAULTS)
    weights = [FAULTS[kind][0] for kind in kinds]
    starts, idle = 0, 0
    while not (starts and run.state().get("state") == "finished"):
        if run.process is None or run.process.poll() is not None:
            starts, idle = starts + 1, idle + 1
            if idle > 6:
                raise SystemExit(f"lost: six starts without a fault did not end it\n{run.log.read_text()[-4000:]}")  # fmt: skip
            run.start()
        goal = run.lines() + chance.randint(0, UPDATES // 12)
        until = time.monotonic() + 90
        assert run.process is not None
        while run.process.poll() is None and run.lines() < goal and time.monotonic() < until:
            time.sleep(0.05)
        if run.process.poll() is None and left > 0 and run.state().get("state") != "finished":
            time.sleep(chance.uniform(0, 0.3))
            (kind,) = chance.choices(kinds, weights)
            if FAULTS[kind][1](run, chance):
                counts[kind] += 1
                left, idle = left - 1, 0
                print(f"{sum(counts.values()):>4} {kind}, after {run.lines()} lines", flush=True)
        elif left <= 0 and run.process.poll() is None:
            run.process.wait(1800)
    if run.process is not None and run.process.poll() is None:
        run.process.wait(120)
    return starts


def main() -> None:
    """Run the campaign and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="faults-"))
    disk = base / "disk"
    disk.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]).returncode
        == 0
    )
    if not mounted:
        FAULTS.pop("full disk")
        print("full disk: skipped, mounting a file system needs root")
    try:
        campaign(base, disk, options)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(disk)], check=True)
        shutil.rmtree(base, ignore_errors=True)


def campaign(base: Path, disk: Path, options: argparse.Namespace) -> None:
    """Run after run, until so many faults were injected; exits with an error where one is lost or diverges."""
    tiny.write_inputs(base)
    expected = undisturbed(Run(base / "whole", base, base / "whole.log"))
    chance, counts, events, runs, starts = (
        random.Random(options.seed),
        Counter[str](),
        Counter[str](),
        0,
        0,
    )
    began = time.monotonic()
    while sum(counts.values()) < options.faults:
        run = Run(disk / f"run-{runs}", base, base / f"run-{runs}.log")
        starts += disturb(run, chance, options.faults - sum(counts.values()), counts)
        runs += 1
        if run.losses() != expected:
            different = [step for step, loss in expected.items() if run.losses().get(step) != loss]
            raise SystemExit(f"silent divergence from update {different[0]} of run {runs}\n{run.log.read_text()[-4000:]}")  # fmt: skip
        for line in (run.folder / "events.jsonl").read_text().splitlines():
            events[json.loads(line)["event"]] += 1
        shutil.rmtree(run.folder)
    report(counts, events, runs, starts, time.monotonic() - began, options)


def report(
    counts: Counter[str],
    events: Counter[str],
    runs: int,
    starts: int,
    seconds: float,
    options: argparse.Namespace,
) -> None:
    """Print the table, and write it where that is asked for."""
    for kind, count in counts.most_common():
        print(f"{kind:<40} {count:>4} injected, none lost")
    print(f"{sum(counts.values())} faults in {runs} runs of {UPDATES} updates, {starts} launches, {seconds:.0f} s; all curves bit-equal")  # fmt: skip
    print(
        "events the runs wrote: "
        + ", ".join(f"{kind} {count}" for kind, count in events.most_common())
    )
    if options.out:
        document = {
            "seed": options.seed, "faults": dict(counts), "events": dict(events), "runs": runs, "launches": starts,
            "updates": UPDATES, "lost": 0, "diverged": 0, "seconds": round(seconds),
        }  # fmt: skip
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
