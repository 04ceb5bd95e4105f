"""Training from a stream too large to store: documents by number, in an order that can be resumed.

Documents are counted over the whole job. The stream is cut into blocks of BLOCK documents, each
shuffled by a keyed permutation; `datasets`' own shuffle buffer is not used because it is lost on
resume. Update N takes documents [N G, (N + 1) G) of that order (padded), or the next G T tokens of
the documents joined in that order (packed), whatever the number of ranks.

Cost: every rank reads the whole stream. In padded mode it tokenises its own documents only; in
packed mode it tokenises all, because where a sample begins depends on every document before it.
"""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from sltrain_dist.data.documents import texts
from sltrain_dist.data.loader import Layout
from sltrain_dist.data.samples import Batch, pack_tokens, pad_rows
from sltrain_dist.data.tokenizer import Tokenizer
from sltrain_dist.utils import counter_random
from sltrain_dist.utils.errors import UserError

BLOCK = 1000  # documents shuffled together, read again after a resume; datasets' default buffer too
_ENCODED_TOGETHER = 64  # documents

Rows = Any  # datasets.IterableDataset: iterable of rows, with state_dict and load_state_dict


@dataclass(frozen=True)
class Cursor:
    """A place in the stream; JSON-able through dataclasses.asdict.

    document, token: first token not yet trained on. block_start, epoch_start: first documents of the
    block and epoch that ``document`` is in. state: `datasets` state at block_start, or None, then
    documents before it are read and dropped. digest: of the block's first text, proves the place.
    """

    document: int = 0
    token: int = 0
    block_start: int = 0
    epoch: int = 0
    epoch_start: int = 0
    state: dict[str, Any] | None = None
    digest: str | None = None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Cursor":
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class DocumentStream:
    """Documents in shuffled order from any place on, with the cursor of each of them."""

    def __init__(self, open_rows: Callable[[], Rows], name: str, seed: int) -> None:
        self._open, self._seed = open_rows, seed
        self._source = f"--corpus {name}"

    def read(self, start: Cursor) -> Iterator[tuple[Cursor, str]]:
        """Endless (cursor at the document, text) from ``start`` on; the stream begins again at its end.

        Raises:
            UserError: the stream is empty, breaks, or is not the one ``start`` was taken from.
        """
        for block, documents in self._blocks(start):
            skipped = max(0, start.document - block.block_start)
            if skipped >= len(documents):
                continue
            key = counter_random.key(self._seed, "stream", block.epoch, block.block_start)
            places = torch.arange(len(documents))
            order = counter_random.permute(key, places, len(documents)).tolist()
            for place in range(skipped, len(documents)):
                number = block.block_start + place
                cursor = Cursor(number, 0, *_block_fields(block))
                yield cursor, documents[order[place]]

    def _blocks(self, start: Cursor) -> Iterator[tuple[Cursor, list[str]]]:
        """(cursor at the block's start, its documents in stream order)."""
        rows, iterator = self._resume(start)
        state = start.state
        epoch, epoch_start, block_start = start.epoch, start.epoch_start, start.block_start
        while True:
            documents = list(itertools.islice(iterator, BLOCK))
            if documents:
                digest = _digest(documents[0])
                yield (
                    Cursor(block_start, 0, block_start, epoch, epoch_start, state, digest),
                    documents,
                )
                block_start += len(documents)
            elif block_start == epoch_start:
                raise UserError(f"{self._source}: the stream is empty; check the corpus")
            else:
                epoch, epoch_start = epoch + 1, block_start
                rows = self._open()
                iterator = texts(rows, self._source)
            state = rows.state_dict()

    def _resume(self, start: Cursor) -> tuple[Rows, Iterator[str]]:
        """The stream at ``start.block_start``: by its state where that leads there, else by skipping.

        States of some versions of `datasets` go wrong (#8308: the second resume began at the
        beginning), so none is believed before the first document has been compared.
        """
        if start.state is not None:
            rows = self._open()
            try:
                rows.load_state_dict(start.state)
                found = _verified(texts(rows, self._source), start.digest)
            except Exception:  # a state of another version of `datasets`, in whatever way it fails
                found = None
            if found is not None:
                return rows, found
        rows = self._open()
        skip = start.block_start - start.epoch_start
        found = _verified(itertools.islice(texts(rows, self._source), skip, None), start.digest)
        if found is None:
            raise UserError(
                f"{self._source}: document {start.block_start} is not the one the checkpoint saw; "
                "give the same corpus, or start a new run"
            )
        return rows, found


def _block_fields(block: Cursor) -> tuple[Any, ...]:
    return block.block_start, block.epoch, block.epoch_start, block.state, block.digest


def _digest(text: str) -> str:
    data = text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _verified(iterator: Iterator[str], digest: str | None) -> Iterator[str] | None:
    """``iterator`` unchanged if its first text has ``digest`` (or none was given), else None."""
    if digest is None:
        return iterator
    first = next(iterator, None)
    if first is None or _digest(first) != digest:
        return None
    return itertools.chain([first], iterator)


def padded_updates(
    stream: DocumentStream, tokenizer: Tokenizer, layout: Layout, length: int, start: Cursor
) -> Iterator[tuple[list[Batch], Cursor]]:
    """(this rank's micro-batches, cursor after the update) of update after update."""
    documents = stream.read(start)
    cursor, text = next(documents)
    while True:
        own: list[str] = []
        for place in range(layout.global_batch):
            if place in layout.own:
                own.append(text)
            cursor, text = next(documents)
        rows = [np.array([*ids, tokenizer.eos_id][:length]) for ids in tokenizer.encode_batch(own)]
        batch = pad_rows(rows, length, tokenizer.eos_id, tokenizer.pad_id)
        yield layout.micro_batches(batch), cursor


def packed_updates(
    stream: DocumentStream, tokenizer: Tokenizer, layout: Layout, length: int, start: Cursor
) -> Iterator[tuple[list[Batch], Cursor]]:
    """(this rank's micro-batches, cursor after the update) of update after update.

    An update consumes G T tokens and reads one more, the label of its last position.
    """
    encoded = _encoded(stream.read(start), tokenizer)
    pending: deque[tuple[Cursor, list[int]]] = deque()  # documents not yet consumed
    offset = start.token  # tokens of the first of them that are
    available = -offset
    need = layout.global_batch * length
    while True:
        while available < need + 1:
            cursor, ids = next(encoded)
            pending.append((cursor, ids))
            available += len(ids)
        joined = itertools.chain.from_iterable(ids for _, ids in pending)
        window = itertools.islice(joined, offset, offset + need + 1)
        tokens = np.fromiter(window, dtype=np.int64, count=need + 1)
        offset += need
        available -= need
        while offset >= len(pending[0][1]):
            offset -= len(pending.popleft()[1])
        first, last = layout.own.start * length, layout.own.stop * length
        after = Cursor(pending[0][0].document, offset, *_block_fields(pending[0][0]))
        yield layout.micro_batches(pack_tokens(tokens[first : last + 1], length)), after


def _encoded(
    documents: Iterator[tuple[Cursor, str]], tokenizer: Tokenizer
) -> Iterator[tuple[Cursor, list[int]]]:
    """Documents as token ids with end of text."""
    while True:
        group = list(itertools.islice(documents, _ENCODED_TOGETHER))
        rows = tokenizer.encode_batch([text for _, text in group])
        for (cursor, _), ids in zip(group, rows, strict=True):
            yield cursor, [*ids, tokenizer.eos_id]
