"""What is prepared once and kept in --cache_dir: the tokenizer and the index of a corpus.

Names of the folders are fingerprints of all that went into them, so nothing stale is ever opened:
another text, tokenizer or vocabulary size has another folder.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sltrain_dist.config import DataConfig
from sltrain_dist.data.corpora import open_corpus
from sltrain_dist.data.documents import FileCorpus, StreamCorpus
from sltrain_dist.data.index import (
    Pair,
    encode,
    fingerprint,
    is_valid,
    open_split,
    prepare_index,
    read_description,
)
from sltrain_dist.data.samples import make_samples
from sltrain_dist.data.split import Split, content_hash, survey
from sltrain_dist.data.storage import ensure_folder
from sltrain_dist.data.tokenizer import (
    TRAINING_CHARACTERS,
    Tokenizer,
    check_vocabulary,
    load_tokenizer,
    train_tokenizer,
)
from sltrain_dist.utils.errors import UserError

TRAINED = "trained"  # value of --tokenizer that means: byte-level BPE trained on the corpus


@dataclass(frozen=True)
class Prepared:
    """What `prepare_data` did; counts of the train split are None for a stream."""

    folder: Path
    built: bool  # False: it was there already
    seconds: float
    vocab_size: int
    train_documents: int | None
    train_tokens: int | None
    train_samples: int | None
    held_out_documents: int
    held_out_tokens: int


class Cache:
    """The cache entries that belong to one DataConfig.

    for_training: an index must hold a sample to train on and a target to evaluate on.
    """

    def __init__(
        self, config: DataConfig, model_vocab_size: int | None, *, for_training: bool = True
    ) -> None:
        self.config, self._model_vocab_size = config, model_vocab_size
        self._for_training = for_training
        self.corpus, row = open_corpus(config.corpus)
        self._root = Path(config.cache_dir).expanduser()
        self.tokenizer_name = config.tokenizer or row.tokenizer

    @cached_property
    def _identity(self) -> str:
        return self.corpus.identity()

    @cached_property
    def _split(self) -> Split:
        assert isinstance(self.corpus, FileCorpus)
        return survey(self.corpus.documents(), self.config.corpus)

    # -- tokenizer ---------------------------------------------------------------------------

    def prepare_tokenizer(self) -> Tokenizer:
        """Train or load the tokenizer, and keep it where every rank finds it."""
        folder = self._tokenizer_folder()
        if folder is not None:
            made: list[Tokenizer] = []

            def write(temporary: Path) -> None:
                made.append(self._make_tokenizer())
                made[0].save(temporary)

            ensure_folder(folder, _holds_tokenizer, write)
        return self.open_tokenizer()

    def open_tokenizer(self) -> Tokenizer:
        """The prepared tokenizer.

        Raises:
            UserError: it is larger than the model's vocabulary, or was not prepared here.
        """
        folder = self._tokenizer_folder()
        if folder is not None and not _holds_tokenizer(folder):
            raise UserError(self._not_prepared(folder))
        tokenizer = load_tokenizer(str(folder or self.tokenizer_name))
        if self._model_vocab_size is not None:
            check_vocabulary(tokenizer, self.tokenizer_name, self._model_vocab_size)
        return tokenizer

    def _tokenizer_folder(self) -> Path | None:
        """Where a trained or downloaded tokenizer is kept; None for one on this machine."""
        if self.tokenizer_name == TRAINED:
            mark = fingerprint(self._identity, "bpe", self._trained_size(), TRAINING_CHARACTERS)
            return self._root / f"tokenizer-{_slug(self.config.corpus)}-{mark[:16]}"
        if Path(self.tokenizer_name).expanduser().exists():
            return None
        return (
            self._root
            / f"tokenizer-{_slug(self.tokenizer_name)}-{fingerprint(self.tokenizer_name)[:16]}"
        )

    def _trained_size(self) -> int:
        return min(self.config.vocab_size, self._model_vocab_size or self.config.vocab_size)

    def _make_tokenizer(self) -> Tokenizer:
        if self.tokenizer_name != TRAINED:
            return load_tokenizer(self.tokenizer_name)
        return train_tokenizer(self._training_text(), self._trained_size())

    def _training_text(self) -> Iterator[str]:
        """Documents of the train split: an even sample of a file corpus, the head of a stream."""
        if isinstance(self.corpus, StreamCorpus):
            yield from self.corpus.documents(self.corpus.train_split)
            return
        split = self._split
        # The hash's low bits decide, its high ones have decided the split.
        share = int(min(1.0, TRAINING_CHARACTERS / split.characters) * (1 << 32))
        for document in self.corpus.documents():
            if split.side(document) == "train" and content_hash(document) & 0xFFFFFFFF <= share:
                yield document

    # -- index -------------------------------------------------------------------------------

    def index_folder(self, tokenizer: Tokenizer) -> Path:
        mark = self._mark(tokenizer)
        return self._root / f"index-{_slug(self.config.corpus)}-{mark[:16]}"

    def _mark(self, tokenizer: Tokenizer) -> str:
        parts: tuple[str | int, ...] = ("index", self._identity, tokenizer.fingerprint)
        if isinstance(self.corpus, StreamCorpus):  # only as much of its held-out split as is asked
            config = self.config
            parts += (config.pack, config.sequence_length, config.eval_tokens)
        return fingerprint(*parts)

    def prepare_index(self, tokenizer: Tokenizer) -> bool:
        """Write the index if it is not there; True if it was written."""
        folder, mark = self.index_folder(tokenizer), self._mark(tokenizer)
        built = prepare_index(folder, mark, tokenizer, lambda: self._pairs(tokenizer))
        self._check_length(folder)
        return built

    def open_index(self, tokenizer: Tokenizer) -> Path:
        """The folder of the prepared index.

        Raises:
            UserError: there is none, or the corpus is too short for one sample.
        """
        folder = self.index_folder(tokenizer)
        if not is_valid(folder, self._mark(tokenizer), checksums=False):
            raise UserError(self._not_prepared(folder))
        self._check_length(folder)
        return folder

    def _pairs(self, tokenizer: Tokenizer) -> Iterator[Pair]:
        if isinstance(self.corpus, FileCorpus):
            side = self._split.side
            yield from encode(tokenizer, ((side(text), text) for text in self.corpus.documents()))
            return
        padded, length = self.config.pack == "padded", self.config.sequence_length
        texts = (("held_out", text) for text in self.corpus.documents(self.corpus.held_out_split))
        targets = 0
        for split, ids in encode(tokenizer, texts):
            kept = ids[:length] if padded else ids
            yield split, kept
            targets += min(len(kept), length - 1) if padded else len(kept) + 1
            if targets > self.config.eval_tokens:
                return

    def _check_length(self, folder: Path) -> None:
        """A corpus to train on must give at least one sample, and one target to evaluate on."""
        config, length = self.config, self.config.sequence_length
        splits = (read_description(folder) or {}).get("splits", {})
        wanted = ["held_out"] if isinstance(self.corpus, StreamCorpus) else ["train", "held_out"]
        for split in wanted if self._for_training else []:
            tokens = splits.get(split, {}).get("tokens", 0)
            least = length + 1 if split == "train" and config.pack == "packed" else 2
            if tokens < least:
                raise UserError(
                    f"--corpus {config.corpus}: too short, its {split.replace('_', '-')} part has "
                    f"{tokens} tokens and --max_length {length} needs {least}; "
                    "give a longer corpus or a smaller --max_length"
                )

    def describe(self, tokenizer: Tokenizer, *, built: bool, seconds: float) -> Prepared:
        """Counts of a prepared index."""
        folder = self.index_folder(tokenizer)
        splits: dict[str, Any] = (read_description(folder) or {})["splits"]
        train = splits.get("train", {})
        samples = None
        if train:
            file = open_split(folder, "train")
            samples = len(make_samples(file, self.config.pack, self.config.sequence_length))
        return Prepared(
            folder=folder,
            built=built,
            seconds=seconds,
            vocab_size=tokenizer.vocab_size,
            train_documents=train.get("documents"),
            train_tokens=train.get("tokens"),
            train_samples=samples,
            held_out_documents=splits["held_out"]["documents"],
            held_out_tokens=splits["held_out"]["tokens"],
        )

    def _not_prepared(self, folder: Path) -> str:
        return (
            f"--cache_dir {self._root}: {folder.name} is not there, though one process prepared it; "
            "give a folder that all ranks of the machine share"
        )


def _holds_tokenizer(folder: Path) -> bool:
    if not (folder / "tokenizer_config.json").is_file():
        return False
    try:
        load_tokenizer(str(folder / "tokenizer.json"))
    except UserError:
        return False
    return True


def _slug(name: str) -> str:
    """A part of ``name`` that is safe in a file name, so that people can tell folders apart."""
    return re.sub(r"[^A-Za-z0-9]+", "_", Path(name).name).strip("_")[:40] or "corpus"
