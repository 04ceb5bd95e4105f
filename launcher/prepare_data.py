#!/usr/bin/env python
"""Tokenise a corpus once, before training: writes the tokenizer and the memory-mapped index.

pretrain.py does the same by itself when needed; on a cluster it is kinder to do it beforehand.
"""

import argparse
import sys

from sltrain_dist.config import DataConfig
from sltrain_dist.data import prepare_data
from sltrain_dist.data.corpora import CORPORA
from sltrain_dist.utils.errors import UserError


def parse(arguments: list[str] | None = None) -> DataConfig:
    """The command line as a DataConfig."""
    default = DataConfig()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    corpora = "; ".join(f"{name}: {row.note}" for name, row in CORPORA.items() if name != "path")
    parser.add_argument(
        "--corpus", default=default.corpus, help=f"{corpora}; else {CORPORA['path'].note}"
    )
    parser.add_argument(
        "--tokenizer",
        help="tokenizer.json, a folder with one, a hub name, or 'trained' on the corpus; "
        "by default trained, and t5-base for c4",
    )
    parser.add_argument("--pack", choices=("packed", "padded"), default=default.pack)
    parser.add_argument(
        "--max_length", type=int, default=default.sequence_length, help="tokens per sample"
    )
    parser.add_argument(
        "--vocab_size", type=int, default=default.vocab_size, help="tokens of a trained tokenizer"
    )
    parser.add_argument("--cache_dir", default=default.cache_dir, help="where the index is kept")
    parsed = parser.parse_args(arguments)
    if parsed.max_length < 2:
        raise UserError(f"--max_length {parsed.max_length}: a sample needs at least 2 tokens")
    settings = vars(parsed)
    return DataConfig(sequence_length=settings.pop("max_length"), **settings)


def main() -> int:
    """Prepare and print the counts; 0, or 2 after a user's error."""
    try:
        result = prepare_data(parse())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result.train_samples is not None:
        print(
            f"train       {result.train_documents:,} documents, {result.train_tokens:,} tokens, "
            f"{result.train_samples:,} samples"
        )
    print(f"held out    {result.held_out_documents:,} documents, {result.held_out_tokens:,} tokens")
    print(f"vocabulary  {result.vocab_size:,}")
    print(f"time        {result.seconds:.1f} s, {'written' if result.built else 'already there'}")
    print(f"path        {result.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
