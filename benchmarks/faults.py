"""A fault campaign: one run after another is killed, stopped, starved, cut off and lied to, and must end on its curve.

    python benchmarks/faults.py [--faults 200] [--seed 0] [--fleets FSDP hosts] [--out benchmarks/results/faults_cpu.json]
    python benchmarks/faults.py --sum benchmarks/results/faults_cpu*.json

Two ranks train a tiny model, in turns under each launcher of FLEETS. At random moments, drawn from the seed, one of the
faults in FAULTS strikes, and every fortieth batch has a loss that is not a number. Where a launcher gives up (no
restarts left, an interruption), the others of the run are ended and all are started again with the same command, as
SLURM does with a job that is requeued. A run is lost where nothing moves for STUCK seconds, or it does not end after
six starts without a fault. Its losses must equal those of the run that nobody disturbed, bit for bit: a difference is a
silent divergence. Prints a table of faults by kind and launcher, and what the runs reported themselves.

Hosts are network namespaces joined by a virtual cable, disks are file systems in memory: both need root. Kinds that this
machine cannot inject are left out with a reason.
"""

import argparse
import itertools
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measure import ROOT, table, write

sys.path.insert(0, str(ROOT))

from sltrain_dist.parallel.mesh import free_port
from sltrain_dist.train.journal import read_events
from tests.launcher import tiny
from tests.launcher.processes import FAULTY

UPDATES = 240  # of a run
TIMEOUT = 6.0  # seconds a collective may take
STUCK = 240.0  # seconds without an update after which a run counts as lost
GRACE = 40.0  # seconds that ranks have to end after their launcher
BAD = "5%40"  # batches whose losses are not finite: number 5 of every 40
FLAGS = {
    "num_training_steps": UPDATES, "save_every": 5, "eval_every": 0, "timeout": TIMEOUT, "continue_from": "auto",
    "max_skips": 10, "total_batch_size": 4,
}  # fmt: skip
ELASTIC = [sys.executable, "-m", "torch.distributed.run", "--max-restarts=3"]


def torchrun(line: list[str]) -> list[list[str]]:
    """One host, two ranks; restarts by torchrun."""
    return [[*ELASTIC, "--nproc-per-node=2", f"--master-port={free_port()}", FAULTY, *line]]


def deepspeed(line: list[str]) -> list[list[str]]:
    """One host, two ranks; no restarts."""
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    port = str(free_port())
    return [[launcher, "--num_gpus", "2", "--master_port", port, FAULTY, *line]]


def two_hosts(line: list[str]) -> list[list[str]]:
    """A torchrun with one rank on each of two hosts, as slurm/_common.sh starts them."""
    return [
        [
            *("ip", "netns", "exec", host(number), *ELASTIC, "--nnodes=2", "--nproc-per-node=1"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={address(0)}:29400", "--rdzv-id=faults"),
            f"--rdzv-conf=is_host={'false' if number else 'true'},read_timeout=60",
            f"--local-addr={address(number)}",
            *(FAULTY, *line),
        ]
        for number in range(2)
    ]


@dataclass(frozen=True)
class Fleet:
    """A way to launch a run of two ranks."""

    commands: Callable[[list[str]], list[list[str]]]
    flags: dict[str, Any] = field(default_factory=dict)
    hosts: int = 1


FLEETS = {
    "torchrun, FSDP": Fleet(torchrun, {"engine": "fsdp"}),
    "torchrun, FSDP, saves beside training": Fleet(torchrun, {"engine": "fsdp", "async_save": "yes"}),
    "deepspeed, ZeRO-2": Fleet(deepspeed, {"ds_config": "ds_configs/zero2.json"}),
    "two hosts, FSDP": Fleet(two_hosts, {"engine": "fsdp"}, hosts=2),
}  # fmt: skip


class LostError(Exception):
    """A run is "lost", or has "diverged": kind, and why."""


@dataclass
class Run:
    """A run under fire."""

    fleet: Fleet
    folder: Path
    inputs: Path
    log: Path
    launchers: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    starts: int = 0
    orphans: int = 0  # ranks that outlived their launcher for longer than GRACE

    def start(self) -> None:
        """Start it, or start it again."""
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "FAULTY_NAN": BAD, "PATH": binaries}
        line = tiny.flags(self.inputs, self.folder, **FLAGS | self.fleet.flags)
        self.starts += 1
        with self.log.open("ab") as log:
            log.write(f"== start {self.starts}\n".encode())
            log.flush()
            for number, command in enumerate(self.fleet.commands(line)):
                # gloo looks for the address of the host's name, which hosts like these have none for
                cable = {"GLOO_SOCKET_IFNAME": f"cable{number}"} if self.fleet.hosts > 1 else {}
                self.launchers.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment | cable, stdout=log, stderr=log)
                )  # fmt: skip

    def runs(self) -> bool:
        """Whether it runs; where one launcher has ended all are ended, as by srun --kill-on-bad-exit."""
        if self.launchers and all(launcher.poll() is None for launcher in self.launchers):
            return True
        if self.launchers:
            if any(launcher.poll() for launcher in self.launchers):
                self._end(signal.SIGTERM)
            self._wait(GRACE)
            self._end(signal.SIGKILL)
            until = time.monotonic() + GRACE
            while self.ranks() and time.monotonic() < until:
                time.sleep(0.2)
            for process in itertools.chain.from_iterable(self.ranks().values()):
                self.orphans += not _stopped(process)
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        self.launchers = []
        return False

    def _end(self, number: int) -> None:
        for launcher in self.launchers:
            if launcher.poll() is None:
                launcher.send_signal(number)

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while any(x.poll() is None for x in self.launchers) and time.monotonic() < until:
            time.sleep(0.1)

    def ranks(self) -> dict[int, list[int]]:
        """Processes by rank; several where one of an earlier start is still there."""
        found: dict[int, list[int]] = {}
        for process in filter(str.isdigit, os.listdir("/proc")):
            try:
                words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
                given = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(self.folder).encode() in words:
                for variable in given:
                    if variable.startswith(b"RANK="):
                        found.setdefault(int(variable[5:]), []).append(int(process))
        return found

    def signal(self, rank: int, number: int) -> bool:
        """Send a signal to a rank; False where it is not there just now."""
        try:
            os.kill(max(self.ranks()[rank]), number)
        except (KeyError, ProcessLookupError):
            time.sleep(0.2)
            return False
        return True

    def finished(self) -> bool:
        """Whether its heartbeat says that it has trained to the end."""
        try:
            return bool(json.loads((self.folder / "heartbeat.json").read_text())["state"] == "finished")  # fmt: skip
        except (OSError, ValueError):
            return False

    def lines(self) -> int:
        """Lines of metrics written."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def losses(self) -> dict[int, str]:
        """By update, none twice; as text, because a loss that is not a number does not equal itself."""
        lines = [line for line in tiny.metrics(self.folder) if "loss" in line]
        assert len({line["step"] for line in lines}) == len(lines), "an update stands twice"
        return {line["step"]: repr(line["loss"]) for line in lines}

    def newest(self) -> Path | None:
        """The newest checkpoint."""
        found = sorted(self.folder.glob("step_*[0-9]"), key=lambda path: int(path.name[5:]))
        return found[-1] if found else None

    def lost(self, why: str, kind: str = "lost") -> "LostError":
        """What ends the campaign."""
        text = self.log.read_text(errors="replace")
        return LostError(kind, f"{self.folder.name}: {why}\n{text[-12000:]}")


def _stopped(process: int) -> bool:
    """Whether a process is stopped, or gone by now."""
    try:
        return "State:\tT" in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True


def _kill(run: Run, chance: random.Random) -> bool:
    return run.signal(chance.randrange(2), signal.SIGKILL)


def _terminate(run: Run, chance: random.Random) -> bool:
    return run.signal(chance.randrange(2), chance.choice([signal.SIGTERM, signal.SIGUSR1]))


def _stop(run: Run, chance: random.Random) -> bool:
    return run.signal(chance.randrange(2), signal.SIGSTOP)


def _launcher(run: Run, chance: random.Random) -> bool:
    chance.choice(run.launchers).send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM]))
    return True


def _damage(run: Run, change: Callable[[bytearray], bytearray], chance: random.Random) -> bool:
    """Change a file of the newest checkpoint and kill a rank, so that the restart must read it."""
    folder = run.newest()
    try:
        assert folder is not None
        path = chance.choice(sorted(path for path in folder.iterdir() if path.stat().st_size))
        path.write_bytes(change(bytearray(path.read_bytes())))
    except (AssertionError, OSError, IndexError):
        return False  # none yet, or just then replaced by a newer one
    return _kill(run, chance)


def _tear(run: Run, chance: random.Random) -> bool:
    return _damage(run, lambda data: data[: chance.randrange(len(data))], chance)


def _flip(run: Run, chance: random.Random) -> bool:
    def flipped(data: bytearray) -> bytearray:
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


def _cut(run: Run, chance: random.Random) -> bool:
    """The cable between the hosts pulled for some seconds: at one of its ends, whose packets then have nowhere to go."""
    end = chance.randrange(2)
    _ip("-n", host(end), "link", "set", f"cable{end}", "down")
    time.sleep(chance.uniform(0.5, 3 * TIMEOUT))
    _ip("-n", host(end), "link", "set", f"cable{end}", "up")
    return True


# How likely it is, how many hosts it takes, and what it does: true where it struck.
FAULTS: dict[str, tuple[int, int, Callable[[Run, random.Random], bool]]] = {
    "SIGKILL of a rank": (5, 1, _kill),
    "SIGTERM or SIGUSR1 to a rank": (4, 1, _terminate),
    "SIGSTOP of a rank": (2, 1, _stop),
    "SIGKILL or SIGTERM of a launcher": (2, 1, _launcher),
    "torn checkpoint file": (2, 1, _tear),
    "flipped bit in a checkpoint file": (2, 1, _flip),
    "full disk": (3, 1, _fill),
    "network cut between two hosts": (6, 2, _cut),
}


def host(number: int) -> str:
    """The name of a network namespace."""
    return f"faults{os.getpid()}-{number}"


def address(number: int) -> str:
    """Of a host, on the cable."""
    return f"10.77.0.{number + 1}"


def _ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0


@contextmanager
def cable() -> Iterator[bool]:
    """Two hosts and a cable between them; false where the machine grants none."""
    made = all(_ip("netns", "add", host(number)) for number in range(2)) and _ip(
        *("link", "add", "cable0", "netns", host(0), "type", "veth"),
        *("peer", "name", "cable1", "netns", host(1)),
    )
    for number in range(2):
        inside, end = ("-n", host(number)), f"cable{number}"
        made = made and _ip(*inside, "addr", "add", f"{address(number)}/24", "dev", end)
        made = made and all(_ip(*inside, "link", "set", name, "up") for name in ("lo", end))
    try:
        yield made
    finally:
        for number in range(2):
            _ip("netns", "del", host(number))


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of its own in that folder, which a fault may fill; false where the machine grants none."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    made = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield made
    finally:
        if made:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def undisturbed(run: Run) -> dict[int, str]:
    """The curve of a run that nobody disturbs; raises LostError."""
    run.start()
    until = time.monotonic() + 900
    while run.runs():
        if time.monotonic() > until:
            raise run.lost("undisturbed, and does not end")
        time.sleep(0.2)
    if not run.finished():
        raise run.lost("undisturbed, and did not finish")
    return run.losses()


def disturb(run: Run, chance: random.Random, left: int, counts: Counter[str]) -> None:
    """Train one run to its end under fire; counts the faults that strike, ``left`` at most."""
    kinds = [kind for kind, (_, hosts, _) in FAULTS.items() if hosts <= run.fleet.hosts]
    weights = [FAULTS[kind][0] for kind in kinds]
    struck, idle = 0, 0
    while True:
        if not run.runs():
            if run.starts and run.finished():
                return
            idle += 1
            if idle > 6:
                raise run.lost("six starts without a fault did not end it")
            run.start()
        seen, still = run.lines(), time.monotonic()
        goal = seen + chance.randint(0, UPDATES // 12)
        while run.runs() and (run.lines() < goal or struck >= left):
            if run.lines() != seen:
                seen, still = run.lines(), time.monotonic()
            if time.monotonic() - still > STUCK:
                raise run.lost(f"no update for {STUCK:.0f} s")
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 0.3))
        if run.runs() and not run.finished():
            (kind,) = chance.choices(kinds, weights)
            if FAULTS[kind][2](run, chance):
                counts[kind] += 1
                struck, idle = struck + 1, 0
                print(f"     {kind}, after {run.lines()} updates", flush=True)


def main() -> None:
    """Run the campaign and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fleets", nargs="+", default=list(FLEETS), help="names, or parts of them")
    parser.add_argument("--logs", type=Path, help="keep the runs' logs in this folder")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sum", nargs="+", type=Path, metavar="FILE", help="run nothing: print the table of these results together")  # fmt: skip
    options = parser.parse_args()
    if options.sum:
        return add_up(options.sum)
    fleets = {name: fleet for name, fleet in FLEETS.items() if any(part in name for part in options.fleets)}  # fmt: skip
    if not fleets:
        raise SystemExit(f"--fleets {options.fleets[0]}: none of {'; '.join(FLEETS)}")
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True)))  # fmt: skip
        if not stack.enter_context(small_disk(base / "disk")):
            FAULTS.pop("full disk")
            print("full disk: left out, mounting a file system needs root")
        if not stack.enter_context(cable()):
            fleets = {name: fleet for name, fleet in fleets.items() if fleet.hosts == 1}
            print("two hosts: left out, network namespaces need root and iproute2")
        campaign(base, fleets, options)


def campaign(base: Path, fleets: dict[str, Fleet], options: argparse.Namespace) -> None:
    """Run after run, until so many faults have struck.

    Raises:
        SystemExit: a run was lost, or ended on another curve.
    """
    logs = options.logs or base
    logs.mkdir(parents=True, exist_ok=True)
    tiny.write_inputs(base)
    expected: dict[str, dict[int, str]] = {}
    rows: dict[str, Counter[str]] = {name: Counter() for name in fleets}
    events, totals, chance = Counter[str](), Counter[str](), random.Random(options.seed)
    began = time.monotonic()
    while (struck := sum(row.total() for row in rows.values())) < options.faults:
        for name, fleet in fleets.items():
            if name not in expected:
                whole = Run(fleet, base / f"whole-{len(expected)}", base, logs / f"whole-{len(expected)}.log")  # fmt: skip
                expected[name] = undisturbed(whole)
            number = totals["runs"]
            run = Run(fleet, base / "disk" / f"run-{number}", base, logs / f"run-{number}.log")
            totals["runs"] += 1
            try:
                disturb(run, chance, max(0, options.faults - struck), rows[name])
                if run.losses() != expected[name]:
                    other = [step for step, loss in expected[name].items() if run.losses().get(step) != loss]  # fmt: skip
                    raise run.lost(f"another loss, or none, from update {other[:1]} on", "diverged")
            except LostError as error:
                kind, why = error.args
                totals[kind] += 1
                save(rows, events, totals, time.monotonic() - began, options)
                raise SystemExit(f"{kind}: {why}") from None
            struck = sum(row.total() for row in rows.values())
            totals.update(starts=run.starts, orphans=run.orphans)
            events.update(line["event"] for line in read_events(run.folder))
            seconds = time.monotonic() - began
            print(f"{struck:>4} faults, {seconds:.0f} s: run {number} ({name}) ended on its curve after {run.starts} starts", flush=True)  # fmt: skip
            shutil.rmtree(run.folder)
            save(rows, events, totals, seconds, options)
            if struck >= options.faults:
                break
    report(rows, events, totals)


def report(rows: dict[str, Counter[str]], events: Counter[str], totals: Counter[str]) -> None:
    """Print the table."""
    kinds = [kind for kind in FAULTS if any(row[kind] for row in rows.values())]
    lines = [["fault", *rows, "all"]]
    for kind in kinds:
        counts = [row[kind] for row in rows.values()]
        lines.append([kind, *map(str, counts), str(sum(counts))])
    sums = [row.total() for row in rows.values()]
    lines.append(["all", *map(str, sums), str(sum(sums))])
    print(table(lines))
    print(
        f"and {events['skipped']} times a batch whose loss is not a number, left out by all ranks"
    )
    print(f"{totals['runs']} runs of {UPDATES} updates in {totals['starts']} starts: {totals['lost']} lost, {totals['diverged']} on another curve, {totals['orphans']} ranks outlived their launcher by {GRACE:.0f} s")  # fmt: skip
    print("events the runs wrote: " + ", ".join(f"{kind} {count}" for kind, count in events.most_common()))  # fmt: skip


def add_up(files: list[Path]) -> None:
    """Print the table of several campaigns, of other seeds or launchers."""
    rows: dict[str, Counter[str]] = {}
    events, totals = Counter[str](), Counter[str]()
    for file in files:
        document = json.loads(file.read_text())
        for row in document["rows"]:
            rows.setdefault(row["launch"], Counter()).update(row["faults"])
        events.update(document["events"])
        totals.update(document["totals"])
    report({name: row for name, row in rows.items() if row}, events, totals)


def save(
    rows: dict[str, Counter[str]],
    events: Counter[str],
    totals: Counter[str],
    seconds: float,
    options: argparse.Namespace,
) -> None:
    """Write what has happened so far."""
    launched = [{"launch": name, "faults": dict(row)} for name, row in rows.items()]
    figures = {"seed": options.seed, "updates": UPDATES, "seconds": round(seconds), "faults": options.faults}  # fmt: skip
    write(options.out, "cpu", launched, **figures, totals=dict(totals), events=dict(events))


if __name__ == "__main__":
    main()
