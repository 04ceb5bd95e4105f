"""Run a test function on several real ranks: spawned processes joined by a gloo process group.

One helper for the whole suite, so that every distributed test fails the same way: with the traceback
of the rank that failed, and without leaving processes behind.

    def body(mesh: Mesh, scale: float) -> float:      # module level: it is pickled by name
        return sum_over_ranks(mesh, torch.tensor(scale * mesh.rank)).item()

    assert run_ranks(body, 2, 3.0) == [3.0, 3.0]
"""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from sltrain_dist.parallel.mesh import close, free_port, initialise


def _rank_main(rank: int, world_size: int, port: int, payload: bytes, pipe: Connection) -> None:
    """Body of one spawned process: set the launcher's variables, run the function, send the outcome."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        import torch

        torch.set_num_threads(1)
        fn, args = pickle.loads(payload)
        mesh = initialise(timeout=120.0, device="cpu")
        outcome = (True, fn(mesh, *args))
        message = pickle.dumps(outcome)
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(message)  # before close(): a hang in tear-down must not hide the outcome
    pipe.close()
    close()


def _collect(
    processes: list[Any], pipes: dict[Connection, int], deadline: float
) -> dict[int, tuple[bool, Any]]:
    """Wait for every rank's outcome, but stop at the first failure: its peers would wait for it forever."""
    outcomes: dict[int, tuple[bool, Any]] = {}
    while pipes:
        ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = sorted(pipes.values())
            return outcomes | dict.fromkeys(missing, (False, "no answer before the time limit"))
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.pop(pipe)
            try:
                outcomes[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(5)
                outcomes[rank] = (False, f"process died with exit code {processes[rank].exitcode}")
            if not outcomes[rank][0]:
                return outcomes
    return outcomes


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0
) -> list[Any]:
    """Call ``fn(mesh, *args)`` on ``world_size`` spawned gloo ranks; return their results in rank order.

    ``fn`` must stand at module level and results must be picklable. Every rank computes with one thread.

    Raises:
        AssertionError: a rank raised, died or did not answer in ``timeout`` seconds; the message holds
            the number of the rank and its traceback.
    """
    context = multiprocessing.get_context("spawn")
    payload = pickle.dumps((fn, args))
    port = free_port()
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the child imports torch
    processes, pipes = [], {}
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(rank, world_size, port, payload, sender), daemon=True
            )
            process.start()
            sender.close()
            processes.append(process)
            pipes[receiver] = rank
        outcomes = _collect(processes, pipes, time.monotonic() + timeout)
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
        failed = len(pipes) > 0
        for process in processes:
            process.join(0.1 if failed else 10)
            if process.is_alive():
                process.kill()
                process.join()
    for rank, (succeeded, value) in outcomes.items():
        assert succeeded, f"rank {rank} of {world_size} failed:\n{value}"
    return [outcomes[rank][1] for rank in range(world_size)]
