#!/usr/bin/env python
"""Look into a checkpoint, verify it, or write it again: offline, one process, no GPU.

python launcher/convert_checkpoint.py runs/a --list                       # a run, or one of its step_N
python launcher/convert_checkpoint.py runs/a/step_1000 --verify           # exit code 2 where it is damaged
python launcher/convert_checkpoint.py runs/a/step_1000 --output small --weights_only --dtype bfloat16
"""

import argparse
import json
import sys
from pathlib import Path

from sltrain_dist.tools.checkpoint_report import (
    checkpoints,
    describe,
    describe_run,
    faults,
    open_folder,
)
from sltrain_dist.tools.checkpoint_table import checkpoint_table, run_table
from sltrain_dist.tools.convert import convert
from sltrain_dist.train.checkpoint_folder import DamagedError
from sltrain_dist.train.flags import DTYPES, Parser
from sltrain_dist.train.summary import human_bytes
from sltrain_dist.utils.errors import UserError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("folder", type=Path, help="a run folder or one of its step_N")
    action = result.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="what is in it")
    action.add_argument("--verify", action="store_true", help="read and check every byte")
    action.add_argument("--output", type=Path, help="write it again, as this new folder")
    result.add_argument("--json", action="store_true", help="--list as JSON")
    result.add_argument(
        "--weights_only", action="store_true", help="--output without optimizer state"
    )
    result.add_argument("--dtype", choices=tuple(DTYPES), help="--output: of all float tensors")
    result.add_argument("--shards", type=int, help="--output: tensor files; derived: of 4 GiB")
    return result


def main(arguments: list[str] | None = None) -> int:
    """List, verify or convert; 0, or 2 after a user's error or for a damaged checkpoint."""
    try:
        given = parser().parse_args(arguments)
        _check(given)
        found = checkpoints(given.folder)
        if given.verify:
            return _verify(found)
        if given.output is None:
            _list(given.folder, found, given.json)
            return 0
        if found != [given.folder]:
            raise UserError(f"FOLDER {given.folder}: a run; give one of its step_N to convert")
        dtype = DTYPES[given.dtype] if given.dtype else None
        done = convert(
            given.folder,
            given.output,
            weights_only=given.weights_only,
            dtype=dtype,
            shards=given.shards,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{done.folder}: {done.tensors} tensors, {human_bytes(done.bytes)} in {done.files} files"
        + (f"; {done.converted} converted to {dtype}" if done.converted else "")
        + (f"; {done.dropped} of the optimizer left out" if done.dropped else "")
    )
    return 0


def _check(given: argparse.Namespace) -> None:
    """Raise UserError for a flag that means nothing beside the others."""
    if given.output is None:
        for name in ("weights_only", "dtype", "shards"):
            if getattr(given, name):
                raise UserError(f"--{name}: goes with --output")
    if given.json and not given.list:
        raise UserError("--json: goes with --list")


def _verify(folders: list[Path]) -> int:
    damaged = 0
    for folder in folders:
        wrong = faults(folder)
        damaged += bool(wrong)
        print("\n".join(f"{folder}: {line}" for line in wrong) or f"{folder}: whole")
    return 2 if damaged else 0


def _list(folder: Path, found: list[Path], as_json: bool) -> None:
    if found != [folder]:
        rows = describe_run(folder)
        print(json.dumps(rows, indent=1) if as_json else run_table(rows))
        return
    try:
        report = describe(open_folder(folder))
    except (DamagedError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"FOLDER {folder}: damaged ({error}); --verify says what is wrong"
        ) from None
    print(json.dumps(report, indent=1) if as_json else checkpoint_table(report))


if __name__ == "__main__":
    sys.exit(main())
