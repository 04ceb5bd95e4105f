"""From tokens to samples: `packed` (default) and `padded` (the paper's way).

    packed   documents joined by end of text; sample i is tokens [iT, iT + T], inputs its first T,
             labels its last T: no padding, every position is trained.
    padded   one sample per document, truncated to T tokens of which the last is end of text, padded
             to T; labels are the inputs shifted, so T - 1 targets at most.

Legend: N samples asked for, T tokens per sample.
"""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sltrain_dist.data.index import TokenFile

IGNORED = -100  # label of a position without target, as torch's cross entropy has it

Batch = dict[str, Tensor]  # {"tokens": int64 [N, T], "labels": int64 [N, T]}


class Samples(Protocol):
    """A split as numbered samples."""

    length: int

    def __len__(self) -> int:
        """Samples of an epoch."""

    def targets(self) -> NDArray[np.int64]:
        """Targets of every sample in order, with the last incomplete one that training leaves out."""

    def gather(self, numbers: NDArray[np.int64]) -> Batch:
        """Samples ``numbers`` (int64 [N]) as a batch."""


def make_samples(file: TokenFile, pack: str, length: int) -> Samples:
    """The samples of length T = ``length`` that mode ``pack`` makes of a split."""
    return PackedSamples(file, length) if pack == "packed" else PaddedSamples(file, length)


class PackedSamples:
    """Windows of T + 1 tokens over the joined documents; neighbours share one token."""

    def __init__(self, file: TokenFile, length: int) -> None:
        self._file, self.length = file, length

    def __len__(self) -> int:
        return max(0, len(self._file.tokens) - 1) // self.length

    def targets(self) -> NDArray[np.int64]:
        full, rest = divmod(max(0, len(self._file.tokens) - 1), self.length)
        return np.array([self.length] * full + [rest] * (rest > 0), dtype=np.int64)

    def gather(self, numbers: NDArray[np.int64]) -> Batch:
        tokens = self._file.tokens
        positions = numbers[:, None] * self.length + np.arange(self.length + 1)
        window = tokens[np.minimum(positions, len(tokens) - 1)].astype(np.int64)
        window[positions >= len(tokens)] = self._file.pad_id
        labels = np.where(positions[:, 1:] < len(tokens), window[:, 1:], IGNORED)
        return {
            "tokens": torch.from_numpy(np.ascontiguousarray(window[:, :-1])),
            "labels": torch.from_numpy(labels),
        }


class PaddedSamples:
    """One document per sample."""

    def __init__(self, file: TokenFile, length: int) -> None:
        self._file, self.length = file, length

    def __len__(self) -> int:
        return self._file.documents

    def targets(self) -> NDArray[np.int64]:
        lengths = np.diff(self._file.offsets).astype(np.int64)  # with end of text
        return np.minimum(lengths, self.length) - 1

    def gather(self, numbers: NDArray[np.int64]) -> Batch:
        offsets = self._file.offsets
        rows = [
            self._file.tokens[int(offsets[n]) : int(offsets[n]) + self.length][
                : int(offsets[n + 1]) - int(offsets[n])
            ]
            for n in numbers
        ]
        return pad_rows(rows, self.length, self._file.eos_id, self._file.pad_id)


def pad_rows(rows: list[NDArray[np.generic]], length: int, eos_id: int, pad_id: int) -> Batch:
    """Documents (tokens with end of text, cut to at most T) as a padded batch of [N, T].

    A cut document ends with end of text too, as a tokenizer that truncates does it.
    """
    tokens = np.full((len(rows), length), pad_id, dtype=np.int64)
    labels = np.full((len(rows), length), IGNORED, dtype=np.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        tokens[index, len(row) - 1] = eos_id
        labels[index, : len(row) - 1] = tokens[index, 1 : len(row)]
    return {"tokens": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}


def pack_tokens(tokens: NDArray[np.int64], length: int) -> Batch:
    """Tokens int64 [N * T + 1] as a packed batch of [N, T]."""
    count = (len(tokens) - 1) // length
    end = count * length
    return {
        "tokens": torch.from_numpy(tokens[:end].reshape(count, length).copy()),
        "labels": torch.from_numpy(tokens[1 : end + 1].reshape(count, length).copy()),
    }


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Samples [start, stop) of a batch."""
    return {name: tensor[start:stop] for name, tensor in batch.items()}
