"""Text to token ids and back: BPE trained on the corpus, or any HF tokenizer, behind one class.

Everything runs on the `tokenizers` library; transformers is only imported to load a tokenizer that
has no tokenizer.json beside it.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sltrain_dist.data.documents import first_line
from sltrain_dist.data.storage import write_synced
from sltrain_dist.utils.errors import UserError

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
TRAINING_CHARACTERS = 4_000_000  # enough for 8192 merges, and a few seconds on two cores
SMALLEST_VOCABULARY = 256 + 2  # every byte, end of text, padding
_LONGEST_EXCERPT = 64 * 1024  # of one document, so that a huge one does not decide the merges
_END_OF_TEXT_NAMES = (
    "</s>", END_OF_TEXT, "<|end_of_text|>", "<eos>", "<|im_end|>", "[EOS]", "[SEP]",
)  # fmt: skip
_PADDING_NAMES = (PADDING, "<pad>", "[PAD]")


class Tokenizer:
    """A `tokenizers` tokenizer with the ids that samples are made of.

    Special tokens spelled out in a text are read as plain text, so a document cannot end a sample.
    """

    def __init__(self, tokenizer: Any, end_of_text: str, padding: str | None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.eos_token = end_of_text
        self.pad_token = padding or end_of_text
        self.eos_id: int = tokenizer.token_to_id(self.eos_token)
        self.pad_id: int = tokenizer.token_to_id(self.pad_token)
        self.vocab_size = self._reachable_ids()
        unknown = getattr(tokenizer.model, "unk_token", None)
        unknown_id = tokenizer.token_to_id(unknown) if unknown else None
        self._replacement_id: int = self.eos_id if unknown_id is None else unknown_id
        self._has_unreachable = self.vocab_size < tokenizer.get_vocab_size(with_added_tokens=True)
        settings = f"\0{self.eos_id}\0{self.pad_id}".encode()
        content = tokenizer.to_str().encode()
        self.fingerprint = hashlib.blake2b(content + settings, digest_size=16).hexdigest()

    def _reachable_ids(self) -> int:
        """One more than the largest id that training can meet.

        Reserved special tokens do not count: T5's 100 extra ids (32000 to 32099) must not ask for
        a larger embedding than the 32000 rows of the paper's models.
        """
        reserved = {
            index
            for index, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special and index not in (self.eos_id, self.pad_id)
        }
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        largest: int = max(index for index in ids if index not in reserved)
        return 1 + largest

    def encode_batch(self, documents: Sequence[str]) -> list[list[int]]:
        """Token ids of every document, all below ``vocab_size``, without any special token."""
        encodings = self._tokenizer.encode_batch_fast(list(documents), add_special_tokens=False)
        rows: list[list[int]] = [encoding.ids for encoding in encodings]
        if self._has_unreachable:  # a text that spells out a reserved token
            limit, other = self.vocab_size, self._replacement_id
            rows = [
                [index if index < limit else other for index in row]
                if max(row, default=0) >= limit
                else row
                for row in rows
            ]
        return rows

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out, ids outside the vocabulary too."""
        known = [index for index in ids if 0 <= index < self.vocab_size]
        text: str = self._tokenizer.decode(known, skip_special_tokens=True)
        return text

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which HF's AutoTokenizer reads."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
        }
        write_synced(folder / "tokenizer.json", self._tokenizer.to_str(pretty=False).encode())
        write_synced(folder / "tokenizer_config.json", json.dumps(config, indent=2).encode())


def check_vocabulary(tokenizer: Tokenizer, name: str, model_vocab_size: int) -> None:
    """Raise UserError if the tokenizer has ids that the model's embedding lacks."""
    if tokenizer.vocab_size > model_vocab_size:
        raise UserError(
            f"--tokenizer {name}: {tokenizer.vocab_size} tokens, but the model's vocabulary has "
            f"{model_vocab_size}; take a smaller tokenizer or a model config with a larger vocab_size"
        )


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE trained on at most TRAINING_CHARACTERS of ``documents``.

    Args:
        vocab_size: tokens including the two special ones; a small corpus gives fewer.

    Raises:
        UserError: ``vocab_size`` below SMALLEST_VOCABULARY.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"--tokenizer_vocab {vocab_size}: byte-level BPE needs at least {SMALLEST_VOCABULARY} tokens; "
            "take a larger one, or a model config with a larger vocab_size"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_excerpts(documents), trainer)
    return Tokenizer(backend, END_OF_TEXT, PADDING)


def _excerpts(documents: Iterable[str]) -> Iterable[str]:
    left = TRAINING_CHARACTERS
    for document in documents:
        excerpt = document[: min(_LONGEST_EXCERPT, left)]
        yield excerpt
        left -= len(excerpt)
        if left <= 0:
            return


def load_tokenizer(name: str) -> Tokenizer:
    """An HF tokenizer: a tokenizer.json, a folder with one, a folder transformers knows, or a hub name.

    Raises:
        UserError: not found, not reachable, not readable, or without an end-of-text token.
    """
    path = Path(name).expanduser()
    if path.is_dir() and (path / "tokenizer.json").is_file():
        path = path / "tokenizer.json"
    if path.is_file():
        return _load_file(path, name)
    if not path.exists() and _looks_like_path(name):
        raise UserError(
            f"--tokenizer {name}: no such file or folder; "
            "give a tokenizer.json, a folder with one, or a name on the HuggingFace hub"
        )
    return _load_with_transformers(name, local=path.exists())


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith(".json") or name.count("/") > 1


def _load_file(path: Path, name: str) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise UserError(
            f"--tokenizer {name}: not a readable tokenizer.json ({first_line(error)}); "
            "give a file written by `tokenizers` or save_pretrained"
        ) from None
    declared: dict[str, Any] = {}
    for sibling in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            declared |= json.loads((path.parent / sibling).read_text())
        except (OSError, ValueError, TypeError):
            continue  # a lone tokenizer.json is enough where its special tokens have a usual name
    return _wrap(backend, name, declared.get("eos_token"), declared.get("pad_token"))


def _load_with_transformers(name: str, *, local: bool) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError(
            f"--tokenizer {name}: needs the package `transformers`; pip install transformers, "
            "give a tokenizer.json, or leave --tokenizer out to train one on the corpus"
        ) from None
    try:
        loaded = AutoTokenizer.from_pretrained(name, local_files_only=True)
    except Exception:  # every kind of tokenizer raises its own kinds when files are missing
        try:
            if not local:
                from sltrain_dist.data.hub import require_hub

                require_hub(f"--tokenizer {name}", "give a tokenizer.json, or --tokenizer trained")
            loaded = AutoTokenizer.from_pretrained(name)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"--tokenizer {name}: cannot be loaded ({first_line(error)}); "
                "give a tokenizer.json, a folder of save_pretrained, or a name on the hub"
            ) from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"--tokenizer {name}: has no fast form (tokenizer.json); "
            "convert it, or leave --tokenizer out to train one on the corpus"
        )
    return _wrap(backend, name, loaded.eos_token, loaded.pad_token)


def _wrap(backend: Any, name: str, end_of_text: Any, padding: Any) -> Tokenizer:
    """Find the special tokens, declared or by their usual names."""
    found = [
        next(
            (token for token in (_content(declared), *usual) if token and _has(backend, token)),
            None,
        )
        for declared, usual in ((end_of_text, _END_OF_TEXT_NAMES), (padding, _PADDING_NAMES))
    ]
    if found[0] is None:
        raise UserError(
            f"--tokenizer {name}: has no end-of-text token; declare eos_token in the "
            "tokenizer_config.json beside it, or leave --tokenizer out to train one"
        )
    return Tokenizer(backend, found[0], found[1])


def _has(backend: Any, token: str) -> bool:
    return backend.token_to_id(token) is not None


def _content(token: Any) -> str | None:
    """The text of a special token as HF's config files hold it: a string or {"content": ...}."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
