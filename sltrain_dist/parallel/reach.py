"""Can all ranks of a launch meet? A meeting over a key-value store, before there is any process group.

`dist.init_process_group` waits many minutes for a rank that never comes, and does not say which. Here every rank
signs in with its host, one that is missing is named after some seconds, and as long as the meeting lasts ranks
exchange small JSON values through the store: that works where gloo and NCCL do not, so it can say that they do not.

Under torchrun the store is the agent's, at MASTER_ADDR:MASTER_PORT; else rank 0 opens it there, as torch would.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from sltrain_dist.parallel.mesh import launched_world_size

_SLICE = 1.0  # seconds between two looks at whether a peer has left
_PINGS = 8  # of every rank to rank 0; the fastest counts


class ReachError(Exception):
    """Ranks that do not meet: what was found, and the mend.

    alone: nobody else can know, so that every rank which finds it must say it.
    """

    def __init__(self, found: str, mend: str, alone: bool = False) -> None:
        super().__init__(found)
        self.found, self.mend, self.alone = found, mend, alone


class LeftError(Exception):
    """A peer has ended the check that this rank is still in: its verdict is the one that counts."""


class Meeting:
    """The ranks of a launch around one store. hosts: of every rank."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.hosts: list[str] = [socket.gethostname()] * world_size
        self._topic, self._count, self._seconds = "", 0, 60.0

    def sign_in(self, seconds: float) -> None:
        """Wait for all ranks.

        Raises:
            ReachError: naming those that did not come.
        """
        own = json.dumps([socket.gethostname(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))])
        keys = [f"here/{rank}" for rank in range(self.world_size)]
        self.store.set(keys[self.rank], own)
        try:
            self.store.wait(keys, timedelta(seconds=seconds))
        except dist.DistStoreError:
            raise self._missing(keys, seconds) from None
        self.hosts = [json.loads(text)[0] for text in self.store.multi_get(keys)]

    def begin(self, topic: str, seconds: float) -> None:
        """From now on `gather` is about ``topic``, and waits at most so many seconds."""
        self._topic, self._count, self._seconds = topic, 0, seconds

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value`` (JSON-able data), in rank order, on every rank.

        Raises:
            LeftError: a peer has called `leave` in place of this.
            ReachError: naming the ranks that did not answer in time.
        """
        key = f"{self._topic}/{self._count}"
        self._count += 1
        keys = [f"{key}/{rank}" for rank in range(self.world_size)]
        self.store.set(keys[self.rank], json.dumps(value))
        if self.store.add(f"{key}/count", 1) == self.world_size:
            self.store.set(f"{key}/all", "")
        self._await(f"{key}/all", keys)
        return [json.loads(text) for text in self.store.multi_get(keys)]

    def leave(self) -> None:
        """End the topic for this rank: peers that wait for more of it stop."""
        self.store.set(f"{self._topic}/left", "")

    def told(self, key: str) -> bool:
        """Whether any rank has called `tell` with this key of the topic."""
        return bool(self.store.check([f"{self._topic}/{key}"]))

    def tell(self, key: str) -> None:
        """Let `told` be true on all ranks."""
        self.store.set(f"{self._topic}/{key}", "")

    def part(self, name: str) -> Store:
        """A part of the store for a process group of these ranks."""
        return PrefixStore(name, self.store)

    def close(self) -> None:
        """Part; whoever has the store waits until all have read what they needed."""
        with contextlib.suppress(RuntimeError):  # one that has gone already must not spoil the end
            self.store.set(f"bye/{self.rank}", "")
            if self.rank == 0:
                keys = [f"bye/{rank}" for rank in range(self.world_size)]
                self.store.wait(keys, timedelta(seconds=10))

    def place(self, rank: int) -> str:
        """ "rank 3 on node1"."""
        return f"rank {rank} on {self.hosts[rank]}"

    def _await(self, done: str, keys: list[str]) -> None:
        deadline = time.monotonic() + self._seconds
        while True:
            with contextlib.suppress(dist.DistStoreError):
                self.store.wait([done], timedelta(seconds=_SLICE))
                return
            if self.told("left") and not self.store.check([done]):
                raise LeftError
            if time.monotonic() > deadline:
                silent = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
                names = ", ".join(self.place(rank) for rank in silent[:4])
                raise ReachError(
                    f"{names} gave no answer in {self._seconds:g} s",
                    "see whether that process still runs, and what it waits for (py-spy dump)",
                )

    def _missing(self, keys: list[str], seconds: float) -> ReachError:
        came = {
            rank: json.loads(self.store.get(key))
            for rank, key in enumerate(keys)
            if self.store.check([key])
        }
        absent = [rank for rank in range(self.world_size) if rank not in came]
        names = ", ".join(f"rank {rank} on {_host(rank, came)}" for rank in absent[:4])
        more = f" and {len(absent) - 4} more" if len(absent) > 4 else ""
        here = ", ".join(sorted({host for host, _ in came.values()}))
        return ReachError(
            f"{names}{more} did not come to {_address()} in {seconds:g} s; ranks on {here} did",
            "see that host's log for why its process did not start or cannot reach this address (firewall, "
            "MASTER_ADDR, GLOO_SOCKET_IFNAME), or raise --meet_timeout",
        )


def meet(seconds: float) -> Meeting:
    """Sign in and wait for all ranks, at most so many seconds.

    Raises:
        ReachError: the port is taken, rank 0 cannot be reached, or ranks are missing.
    """
    world_size = launched_world_size()
    rank = int(os.environ["RANK"]) if world_size > 1 else 0
    store: Store = HashStore() if world_size == 1 else _store(rank, world_size, seconds)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    meeting = Meeting(PrefixStore(f"doctor/{attempt}", store), rank, world_size)
    try:
        meeting.sign_in(seconds)
    except dist.DistNetworkError:  # the rank that has the store has given up meanwhile
        raise ReachError(f"{_address()}: rank 0 has left", "see what rank 0 says") from None
    return meeting


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _store(rank: int, world_size: int, seconds: float) -> Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank == 0 and not agent:
        return _open(host, port, world_size, seconds)
    problem = _connects(host, port, seconds)
    found: list[Any] = []
    if problem is None:

        def join() -> None:
            with contextlib.suppress(RuntimeError):
                found.append(_tcp(host, port, world_size, False, seconds))

        # A stranger that listens there and says nothing would hold this call for ever.
        thread = threading.Thread(target=join, daemon=True)
        thread.start()
        thread.join(seconds)
        problem = "something listens there that is no rank 0"
    if not found:
        raise ReachError(
            f"no rank 0 at {host}:{port} in {seconds:g} s ({problem})",
            "see whether rank 0 runs, whether MASTER_ADDR is its host's address and no firewall stands between",
            alone=True,
        )
    store: Store = found[0]
    return store


def _tcp(host: str, port: int, world_size: int, master: bool, seconds: float) -> Store:
    wait = timedelta(seconds=seconds)
    return TCPStore(host, port, world_size, master, wait, wait_for_workers=False)


def _open(host: str, port: int, world_size: int, seconds: float) -> Store:
    try:
        return _tcp(host, port, world_size, True, seconds)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if "EADDRINUSE" not in text and "already in use" not in text:
            reason, mend = text[:200], "give the address of rank 0's host as MASTER_ADDR"
        else:
            reason = f"the port is taken{_holder(port)}"
            mend = "end that process, or give another port (--master_port, MASTER_PORT)"
        raise ReachError(f"rank 0 cannot listen on {host}:{port}: {reason}", mend) from None


def _connects(host: str, port: int, seconds: float) -> str | None:
    """Why no connection to that port came about, or None."""
    deadline, problem = time.monotonic() + seconds, "no answer"
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), timeout=min(5.0, seconds)).close()
            return None
        except socket.gaierror:
            problem = f"the name {host} is unknown here"
        except OSError as error:
            problem = error.strerror or str(error)
        time.sleep(0.2)
    return problem


def _holder(port: int) -> str:
    """ " by python (pid 7)": who listens on a port of this host, where this user may see it."""
    with contextlib.suppress(Exception):  # psutil may be missing, and refuses what others own
        import psutil

        for link in psutil.net_connections("tcp"):
            if link.status == psutil.CONN_LISTEN and link.laddr.port == port and link.pid:
                return f" by {psutil.Process(link.pid).name()} (pid {link.pid})"
    return ""


def _host(rank: int, came: dict[int, list[Any]]) -> str:
    """The host of a rank that did not come: that of a peer of its node, or what SLURM calls the node."""
    size = next(iter(came.values()))[1] if came else 1
    node = rank // size
    for peer, (host, _) in came.items():
        if peer // size == node:
            return str(host)
    names = job_hosts()
    return names[node] if node < len(names) else f"node {node} of the launch"


def job_hosts() -> list[str]:
    """The hosts of the SLURM job this process is in, in order; none outside of one."""
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    if not nodes or shutil.which("scontrol") is None:
        return [nodes] if nodes and "[" not in nodes and "," not in nodes else []
    command = ["scontrol", "show", "hostnames", nodes]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.split()
    return []


def clock_skew(meeting: Meeting, clock: Callable[[], float] = time.time) -> tuple[float, float]:
    """Seconds that this rank's clock is ahead of rank 0's, and how far off that may be; all ranks must call it.

    Every rank in turn asks rank 0 for its time: of the fastest round trip the middle is taken. Half of the
    round trip is the error that this can have.
    """
    if meeting.rank == 0:
        for rank in range(1, meeting.world_size):
            for number in range(_PINGS):
                meeting.store.wait([f"clock/ask/{rank}/{number}"], timedelta(seconds=60))
                meeting.store.set(f"clock/answer/{rank}/{number}", repr(clock()))
        return 0.0, 0.0
    trips = []
    for number in range(_PINGS):
        if number == 0 and meeting.rank > 1:  # not before its turn: it would measure a queue
            last = f"clock/answer/{meeting.rank - 1}/{_PINGS - 1}"
            meeting.store.wait([last], timedelta(seconds=60))
        asked = clock()
        meeting.store.set(f"clock/ask/{meeting.rank}/{number}", "")
        meeting.store.wait([f"clock/answer/{meeting.rank}/{number}"], timedelta(seconds=60))
        answered = clock()
        theirs = float(meeting.store.get(f"clock/answer/{meeting.rank}/{number}"))
        trips.append((answered - asked, (asked + answered) / 2 - theirs))
    trip, ahead = min(trips)
    return ahead, trip / 2
