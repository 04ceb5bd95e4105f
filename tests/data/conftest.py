"""Small corpora on disk and short ways to open them."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sltrain_dist.config import DataConfig
from sltrain_dist.data.samples import Batch

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "rain",
    "falls",
    "on",
    "quiet",
    "hills",
]


def document(number: int) -> str:
    """A different short text for every number."""
    words = [WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(20 + number % 17)]
    return f"document {number}: " + " ".join(words) + ".\n"


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """80 text files in two folders."""
    for number in range(80):
        path = tmp_path / "texts" / ("a" if number % 2 else "b") / f"{number:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document(number))
    return tmp_path / "texts"


@pytest.fixture
def c4_folder(tmp_path: Path) -> Path:
    """A mirror with C4's file names and schema: 3 + 1 shards of 130 rows."""
    folder = tmp_path / "mirror" / "en"
    folder.mkdir(parents=True)
    for shard in range(4):
        split = "train" if shard < 3 else "validation"
        name = f"c4-{split}.{shard % 3:05}-of-00003.json.gz"
        with gzip.open(folder / name, "wt") as file:
            for row in range(130):
                fields = {
                    "text": document(shard * 130 + row),
                    "timestamp": "2019-04-25T12:57:54Z",
                    "url": "http://example.org/",
                }
                file.write(json.dumps(fields) + "\n")
    return folder.parent


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """DataConfig with a cache of its own and small sizes."""

    def make(corpus: Path | str, **changes: Any) -> DataConfig:
        fields: dict[str, Any] = {
            "cache_dir": str(tmp_path / "cache"),
            "sequence_length": 16,
            "vocab_size": 300,
            "eval_tokens": 10_000,
        }
        return DataConfig(corpus=str(corpus), **(fields | changes))

    return make


def joined(batches: list[Batch]) -> Batch:
    """Batches put under one another."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in ("tokens", "labels")}


def same(left: Batch, right: Batch) -> bool:
    return all(torch.equal(left[name], right[name]) for name in ("tokens", "labels"))
