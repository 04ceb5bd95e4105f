#!/usr/bin/env python
"""Tokenise a corpus once, before training: writes the tokenizer and the memory-mapped index.

pretrain.py does the same by itself when needed; on a cluster it is kinder to do it beforehand. The
flags are pretrain.py's and resolve as they do there, so that the same flags find the same index.
"""

import argparse
import sys

from sltrain_dist.config import TrainConfig
from sltrain_dist.data import prepare_data
from sltrain_dist.train.flags import FLAGS
from sltrain_dist.train.settings import resolve
from sltrain_dist.utils.errors import UserError

# What decides the tokenizer and the index. --model caps a trained vocabulary and brings its recipe.
NAMES = ("model", "corpus", "tokenizer", "tokenizer_vocab", "pack", "max_length", "eval_tokens", "cache_dir")  # fmt: skip


def parse(arguments: list[str] | None = None) -> TrainConfig:
    """The command line resolved as pretrain.py would, on one process.

    Raises:
        UserError: as ``resolve``.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    for name in NAMES:
        flag = FLAGS[name]
        note = "" if flag.default is None else f" [{flag.default}]"
        parser.add_argument(
            f"--{name}", type=flag.kind or str, choices=flag.choices, help=flag.help + note
        )
    parser.add_argument(
        "--vocab_size", dest="tokenizer_vocab", type=int, help="old name of --tokenizer_vocab"
    )
    given = vars(parser.parse_args(arguments))
    return resolve([f"--{name}={value}" for name, value in given.items()], world_size=1)


def main() -> int:
    """Prepare and print the counts; 0, or 2 after a user's error."""
    try:
        config = parse()
        result = prepare_data(config.data, config.model.vocab_size)
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
