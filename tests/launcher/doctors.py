"""Two real ranks that examine one launch after the other: starting Python and torch takes longer than most checks."""

import contextlib
import io
import multiprocessing
import os
import re
import traceback
from multiprocessing.connection import Connection
from typing import NamedTuple

from sltrain_dist.parallel.mesh import free_port

RANKS = 2
TRIAL = "trial"


class Examined(NamedTuple):
    """Exit codes of the ranks, and what each printed."""

    codes: list[int]
    texts: list[str]

    def row(self, name: str) -> tuple[str, str, str]:
        """(status, found, mend) of a check, as rank 0 printed it."""
        lines = self.texts[0].splitlines()
        places = [n for n, line in enumerate(lines) if re.match(rf"\w+ +{name} ", line)]
        assert len(places) == 1, self.texts[0]
        status, _, found = lines[places[0]].split(maxsplit=2)
        following = lines[places[0] + 1].split(maxsplit=1)
        mend = following[1] if following[0] == "mend" else ""
        return status, found, mend

    def failed(self) -> list[str]:
        """The checks that failed."""
        return re.findall(r"^failed +(\w+)", self.texts[0], re.MULTILINE)


def _serve(rank: int, pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    from launcher.doctor import main
    from sltrain_dist.ops import kernels

    before = dict(os.environ)
    while (order := pipe.recv()) is not None:
        arguments, variables = order
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), **variables)
        kernels.load.cache_clear()
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            try:
                code = main(arguments)
            except BaseException:
                code = 1
                traceback.print_exc()
        pipe.send((code, text.getvalue()))
        os.environ.clear()
        os.environ.update(before)


class Pair:
    """The two processes."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        self.processes = []
        for rank in range(RANKS):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=False)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def examine(
        self,
        line: list[str],
        *,
        second: list[str] | None = None,
        ranks: tuple[int, ...] = (0, 1),
        trial: bool = False,
        **variables: str,
    ) -> Examined:
        """Run the doctor. second: other flags of rank 1. ranks: those that come."""
        variables = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "LOCAL_WORLD_SIZE": str(RANKS),
        } | variables
        more = [] if trial else ["--skip", TRIAL]
        for rank in ranks:
            flags = second if rank == 1 and second is not None else line
            self.pipes[rank].send(([*flags, *more], variables))
        answers = []
        for rank in ranks:
            assert self.pipes[rank].poll(300), "no answer"
            answers.append(self.pipes[rank].recv())
        return Examined([code for code, _ in answers], [text for _, text in answers])

    def close(self) -> None:
        """End both."""
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            with contextlib.suppress(OSError):
                pipe.send(None)
            process.join(10)
            process.kill()
