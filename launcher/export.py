#!/usr/bin/env python
"""Export weights: --to hf gives a dense LLaMA that transformers loads, --to factored a small folder of ours.

python launcher/export.py --to hf runs/a --output a-hf        # a run, one of its step_N, or a factored folder
"""

import argparse
import sys
from pathlib import Path

from sltrain_dist.tools.export import EXPORTS, SHARD_SIZE
from sltrain_dist.tools.weights import open_pretrained
from sltrain_dist.train.flags import DTYPES, Parser
from sltrain_dist.utils.errors import UserError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument(
        "model", help="a run folder, one of its step_N, a factored or an HF LLaMA folder"
    )
    result.add_argument("--to", choices=tuple(EXPORTS), required=True, help="what to write")
    result.add_argument("--output", required=True, help="a new folder")
    result.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="of the tensors [float32]"
    )
    result.add_argument(
        "--max_shard_size",
        default=SHARD_SIZE,
        help=f"of a file, and of the memory needed [{SHARD_SIZE}]",
    )
    return result


def main(arguments: list[str] | None = None) -> int:
    """Export and print a summary; 0, or 2 after a user's error."""
    try:
        given = parser().parse_args(arguments)
        pretrained = open_pretrained(given.model, "MODEL")
        export, dtype = EXPORTS[given.to], DTYPES[given.dtype]
        done = export(pretrained, Path(given.output), dtype, given.max_shard_size)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(done.lines()))
    if pretrained.tokenizer is None:
        print("note        no tokenizer was found beside the weights, none was written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
