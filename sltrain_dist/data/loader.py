"""Which samples an update trains on, and how a rank gets its share of them in time.

The order of samples is a pure function of (seed, epoch, sample number): update N trains samples
[N G, (N + 1) G) of the order, G the global batch, and a rank takes a fixed slice of them. Ranks
together therefore see the same samples for every world size and micro-batch, and a resume needs no
more than the number N.
"""

import itertools
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from sltrain_dist.data.samples import Batch, Samples, cut
from sltrain_dist.utils import counter_random, interrupt

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """How the samples of an update are dealt out.

    Rank r's micro-batch m takes samples [r A B + m B, r A B + (m + 1) B) of the update's G = R A B,
    with R ranks, A micro-batches per rank and update, B samples per micro-batch.
    """

    global_batch: int
    micro_batch: int
    gradient_accumulation: int
    dp_rank: int
    dp_size: int

    def __post_init__(self) -> None:
        product = self.micro_batch * self.gradient_accumulation * self.dp_size
        if product != self.global_batch or not 0 <= self.dp_rank < self.dp_size:
            raise ValueError(f"inconsistent layout: {self}")

    @property
    def own(self) -> range:
        """Positions of this rank's samples inside an update."""
        share = self.global_batch // self.dp_size
        return range(self.dp_rank * share, (self.dp_rank + 1) * share)

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """A rank's share of an update [A * B, T] as A micro-batches of [B, T]."""
        size = self.micro_batch
        return [cut(batch, i * size, (i + 1) * size) for i in range(self.gradient_accumulation)]


def sample_numbers(seed: int, start: int, stop: int, epoch_size: int) -> NDArray[np.int64]:
    """Samples at places [start, stop) of the endless order, int64; every epoch is its own permutation."""
    places = torch.arange(start, stop, dtype=torch.int64)
    numbers = torch.empty_like(places)
    for epoch in range(start // epoch_size, (stop - 1) // epoch_size + 1):
        inside = places // epoch_size == epoch
        key = counter_random.key(seed, "sample order", epoch)
        numbers[inside] = counter_random.permute(key, places[inside] % epoch_size, epoch_size)
    result: NDArray[np.int64] = numbers.numpy()
    return result


class _Updates(Dataset[list[Batch]]):
    """Update number -> this rank's micro-batches of it."""

    def __init__(self, samples: Samples, layout: Layout, seed: int) -> None:
        self._samples, self._layout, self._seed = samples, layout, seed

    def __getitem__(self, update: int) -> list[Batch]:
        first = update * self._layout.global_batch
        own = self._layout.own
        numbers = sample_numbers(
            self._seed, first + own.start, first + own.stop, len(self._samples)
        )
        return self._layout.micro_batches(self._samples.gather(numbers))


def index_updates(
    samples: Samples, layout: Layout, *, seed: int, start: int, workers: int
) -> Iterator[list[Batch]]:
    """Endless micro-batches of the updates from number ``start`` on, one list per update.

    With ``workers`` > 0 so many processes of a torch DataLoader read ahead; batches are the same.
    """
    updates = _Updates(samples, layout, seed)
    numbers = itertools.count(start)
    if workers == 0:
        return map(updates.__getitem__, numbers)
    # Its own generator: the DataLoader's would draw from torch's global one, and dropout after a
    # resume would differ from the run that was not interrupted.
    loader: DataLoader[list[Batch]] = DataLoader(
        updates,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        generator=torch.Generator(),
        # After torch has set its own handlers: a scheduler's signal reaches workers too, and must not end them.
        worker_init_fn=_go_on,
    )
    return iter(loader)


def _go_on(worker: int) -> None:
    interrupt.ignore()


def read_ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """``items`` computed by a thread, at most ``depth`` of them in advance; its errors are raised here.

    A thread, not a process: network and tokenizer release the interpreter lock, and a forked
    process would inherit neither the hub's connections nor the tokenizer's threads in working order.
    """
    box: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(entry: tuple[T | None, BaseException | None, bool]) -> bool:
        while not stopped.is_set():
            try:
                box.put(entry, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None, False)):
                    return
            put((None, None, True))
        except BaseException as error:
            put((None, error, True))

    thread = threading.Thread(target=work, daemon=True, name="read_ahead")
    thread.start()
    try:
        while True:
            item, error, last = box.get()
            if error is not None:
                raise error
            if last:
                return
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()
