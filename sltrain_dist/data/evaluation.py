"""The held-out tokens in fixed order, dealt over ranks so that each is counted exactly once."""

from collections.abc import Iterator

import numpy as np

from sltrain_dist.data.samples import IGNORED, Batch, Samples


class Evaluation:
    """This rank's evaluation batches: the first ``eval_tokens`` targets of the held-out split.

    Every rank has the same number of batches of the same shape [B, T] (a rank of a sharded model
    that stopped early would leave the others waiting); places beyond the last sample are filled
    with samples whose labels are all ignored. Global batch k is samples [k B R, (k + 1) B R).

    Attributes:
        samples: samples evaluated, over all ranks.
        tokens: targets evaluated, over all ranks.
    """

    def __init__(
        self, samples: Samples, *, eval_tokens: int, micro_batch: int, dp_rank: int, dp_size: int
    ) -> None:
        ends = np.cumsum(samples.targets())
        self.tokens = min(eval_tokens, int(ends[-1]))
        self.samples = int(np.searchsorted(ends, self.tokens)) + 1
        self._beyond = int(ends[self.samples - 1]) - self.tokens  # targets of the last sample
        self._source, self._micro_batch = samples, micro_batch
        self._dp_rank, self._dp_size = dp_rank, dp_size

    def __len__(self) -> int:
        """Batches, the same number on every rank."""
        return -(-self.samples // (self._micro_batch * self._dp_size))

    def __iter__(self) -> Iterator[Batch]:
        size = self._micro_batch
        for number in range(len(self)):
            first = (number * self._dp_size + self._dp_rank) * size
            wanted = np.arange(first, first + size, dtype=np.int64)
            batch = self._source.gather(np.minimum(wanted, self.samples - 1))
            labels = batch["labels"]
            labels[wanted >= self.samples] = IGNORED
            if self._beyond and first < self.samples <= first + size:
                row = labels[self.samples - 1 - first]
                row[(row != IGNORED).nonzero()[-self._beyond :]] = IGNORED
            yield batch
