"""The one door of data/: `prepare_data` on one rank, then `open_data` on all of them.

    corpus -> held-out split -> tokenizer -> index on disk -> samples -> order -> batches

Nothing here talks to other ranks: the caller prepares on one rank per node, waits, and opens.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sltrain_dist.config import DataConfig
from sltrain_dist.data.cache import Cache, Prepared
from sltrain_dist.data.documents import StreamCorpus
from sltrain_dist.data.evaluation import Evaluation
from sltrain_dist.data.index import fingerprint, open_split
from sltrain_dist.data.loader import Layout, index_updates, read_ahead
from sltrain_dist.data.samples import Batch, Samples, make_samples
from sltrain_dist.data.streaming import (
    Cursor,
    DocumentStream,
    packed_updates,
    padded_updates,
)
from sltrain_dist.data.tokenizer import Tokenizer
from sltrain_dist.utils.errors import UserError


class Data(Protocol):
    """What training needs of a corpus.

    Attributes:
        train_samples, train_tokens: samples and targets of an epoch; None for a stream.
    """

    tokenizer: Tokenizer
    train_samples: int | None
    train_tokens: int | None
    description: str

    def updates(self, start: int) -> Iterator[list[Batch]]:
        """Endless updates from number ``start`` on, each this rank's list of micro-batches."""

    def evaluation(self, micro_batch: int) -> Evaluation:
        """This rank's share of the held-out tokens, in batches of ``micro_batch`` samples."""

    def state(self, update: int) -> dict[str, Any]:
        """JSON-able position before update ``update``, which `updates` has reached."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over a position; then call ``updates(state["update"])``.

        Raises:
            UserError: it belongs to another corpus, tokenizer, order or sample length.
        """


def prepare_data(config: DataConfig, model_vocab_size: int | None = None) -> Prepared:
    """Do everything that is done once: train or fetch the tokenizer, write the index.

    Call it on one process per cache folder while the others wait; two independent runs at once are
    safe too. A second call finds all in place and only checks it.

    Args:
        model_vocab_size: rows of the model's embedding; None where no model is concerned.

    Raises:
        UserError: anything wrong with --corpus, --tokenizer, --cache_dir or --max_length.
    """
    began = time.perf_counter()
    cache = Cache(config, model_vocab_size)
    if isinstance(cache.corpus, StreamCorpus):
        # First of all: without network the default tokenizer fails too, and blames a flag not given.
        cache.corpus.require_reachable()
    tokenizer = cache.prepare_tokenizer()
    built = cache.prepare_index(tokenizer)
    return cache.describe(tokenizer, built=built, seconds=time.perf_counter() - began)


def open_data(
    config: DataConfig,
    model_vocab_size: int | None = None,
    *,
    global_batch: int,
    micro_batch: int,
    gradient_accumulation: int = 1,
    dp_rank: int = 0,
    dp_size: int = 1,
    prepare: bool = True,
) -> Data:
    """Open a corpus for one data-parallel rank.

    Args:
        global_batch: samples of an update, = micro_batch * gradient_accumulation * dp_size.
        micro_batch: samples of a micro-batch of one rank.
        prepare: prepare what is missing; False on ranks that waited for `prepare_data`.

    Raises:
        UserError: as `prepare_data`, or nothing was prepared where this rank can see it.
        ValueError: the batch sizes contradict each other.
    """
    layout = Layout(global_batch, micro_batch, gradient_accumulation, dp_rank, dp_size)
    if prepare:
        prepare_data(config, model_vocab_size)
    cache = Cache(config, model_vocab_size)
    tokenizer = cache.open_tokenizer()
    held_out = make_samples(
        open_split(cache.open_index(tokenizer), "held_out"), config.pack, config.sequence_length
    )
    if isinstance(cache.corpus, StreamCorpus):
        return StreamData(config, layout, cache.corpus, tokenizer, held_out)
    return IndexData(config, layout, cache.index_folder(tokenizer), tokenizer, held_out)


@dataclass
class _Base:
    """What both kinds of data share."""

    config: DataConfig
    layout: Layout
    tokenizer: Tokenizer
    held_out: Samples
    order: str  # fingerprint of everything the order of samples depends on

    def evaluation(self, micro_batch: int) -> Evaluation:
        return Evaluation(
            self.held_out,
            eval_tokens=self.config.eval_tokens,
            micro_batch=micro_batch,
            dp_rank=self.layout.dp_rank,
            dp_size=self.layout.dp_size,
        )

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if (
            state.get("order") != self.order
            or state.get("global_batch") != self.layout.global_batch
        ):
            raise UserError(
                f"--corpus {self.config.corpus}: the checkpoint was trained on other text, tokenizer, "
                "--pack, --max_length, --seed or --total_batch_size; give the same, or start a new run"
            )


class IndexData(_Base):
    """A tokenised corpus on disk: a position is the number of the update."""

    def __init__(
        self,
        config: DataConfig,
        layout: Layout,
        folder: Path,
        tokenizer: Tokenizer,
        held_out: Samples,
    ) -> None:
        order = fingerprint(folder.name, config.pack, config.sequence_length, config.seed)
        super().__init__(config, layout, tokenizer, held_out, order)
        self._samples = make_samples(
            open_split(folder, "train"), config.pack, config.sequence_length
        )
        self.train_samples: int | None = len(self._samples)
        targets = self._samples.targets()[: len(self._samples)]
        self.train_tokens: int | None = int(targets.sum())
        self.description = (
            f"{config.corpus}, {config.pack}, {self.train_samples:,} samples of "
            f"{config.sequence_length} tokens an epoch, vocabulary {tokenizer.vocab_size:,}"
        )

    def updates(self, start: int) -> Iterator[list[Batch]]:
        seed, workers = self.config.seed, self.config.workers
        return index_updates(self._samples, self.layout, seed=seed, start=start, workers=workers)

    def state(self, update: int) -> dict[str, Any]:
        return {"update": update, "global_batch": self.layout.global_batch, "order": self.order}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._check_state(state)


class StreamData(_Base):
    """A stream: a position is the cursor that stood before the update."""

    train_samples: int | None = None
    train_tokens: int | None = None

    def __init__(
        self,
        config: DataConfig,
        layout: Layout,
        corpus: StreamCorpus,
        tokenizer: Tokenizer,
        held_out: Samples,
    ) -> None:
        order = fingerprint(
            corpus.identity(),
            tokenizer.fingerprint,
            config.pack,
            config.sequence_length,
            config.seed,
        )
        super().__init__(config, layout, tokenizer, held_out, order)
        self._corpus = corpus
        self._cursors: dict[int, Cursor] = {0: Cursor()}
        self.description = (
            f"{config.corpus}, streamed, {config.pack}, samples of {config.sequence_length} tokens, "
            f"vocabulary {tokenizer.vocab_size:,}"
        )

    def updates(self, start: int) -> Iterator[list[Batch]]:
        stream = DocumentStream(
            lambda: self._corpus.open(self._corpus.train_split),
            self.config.corpus,
            self.config.seed,
        )
        known = start in self._cursors
        cursor = self._cursors.get(start, Cursor())
        if not known and self.config.pack == "padded":
            # One document a sample: the place is known without tokenising what comes before.
            known, cursor = True, Cursor(document=start * self.layout.global_batch)
        make = padded_updates if self.config.pack == "padded" else packed_updates
        items = make(stream, self.tokenizer, self.layout, self.config.sequence_length, cursor)
        if not known:
            for _ in range(start):
                _, cursor = next(items)
        if self.config.workers:
            items = read_ahead(items, self.config.workers)
        return self._follow(items, start, cursor)

    def _follow(
        self, items: Iterator[tuple[list[Batch], Cursor]], start: int, cursor: Cursor
    ) -> Iterator[list[Batch]]:
        """Hand out updates and remember the cursors around the one handed out last."""
        self._cursors = {start: cursor}
        for number, (micro_batches, after) in enumerate(items, start):
            self._cursors = {number: cursor, number + 1: after}
            cursor = after
            yield micro_batches

    def state(self, update: int) -> dict[str, Any]:
        if update not in self._cursors:
            raise ValueError(f"update {update} is not where the stream is: {list(self._cursors)}")
        return {
            "update": update,
            "global_batch": self.layout.global_batch,
            "order": self.order,
            "cursor": self._cursors[update].to_json(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._check_state(state)
        self._cursors = {int(state["update"]): Cursor.from_json(state["cursor"])}
