"""Which documents are held out for evaluation: decided by a keyed hash of each document's content.

So the split does not move when documents are added, reordered or read by another number of ranks,
and equal documents are never on both sides.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sltrain_dist.utils.errors import UserError

Side = Literal["train", "held_out"]

HELD_OUT_SHARE = 0.03
_KEY = b"sltrain_dist held-out split 1"
_RANGE = 1 << 64


def content_hash(document: str) -> int:
    """64 uniform bits of a document's content."""
    digest = hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=8, key=_KEY)
    return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True)
class Split:
    """The rule, and what was seen while it was fixed. Held out is a hash below ``threshold``."""

    threshold: int
    documents: int
    characters: int

    def side(self, document: str) -> Side:
        return "held_out" if content_hash(document) < self.threshold else "train"


def survey(documents: Iterable[str], name: str) -> Split:
    """Read a corpus once and fix its split: HELD_OUT_SHARE of the documents, at least one each side.

    Raises:
        UserError: no text at all, or fewer than two different documents.
    """
    lowest, highest, count, characters = _RANGE, -1, 0, 0
    for document in documents:
        value = content_hash(document)
        lowest, highest = min(lowest, value), max(highest, value)
        count += 1
        characters += len(document)
    if count == 0:
        raise UserError(f"--corpus {name}: empty, there is no text in it; give a corpus with text")
    if lowest == highest:
        raise UserError(
            f"--corpus {name}: too small for a held-out split, all its text is one document of "
            f"{characters} characters; give at least two different documents or a longer text"
        )
    threshold = min(max(int(HELD_OUT_SHARE * _RANGE), lowest + 1), highest)
    return Split(threshold, count, characters)
