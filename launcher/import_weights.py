#!/usr/bin/env python
"""Import weights into a factored folder, which export, generate, evaluate and pretrain.py --init_from read.

    python launcher/import_weights.py --from hf LLAMA --output FOLDER                      # dense, method full
    python launcher/import_weights.py --from hf LLAMA --output FOLDER --method sltrain     # SVD, and S at its support
    python launcher/import_weights.py --from reference CHECKPOINT --output FOLDER          # of the SLTrain authors

Nothing is unpickled: a pytorch_model.bin with anything but tensors is refused.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from sltrain_dist.config import MethodConfig
from sltrain_dist.tools.export import SHARD_SIZE, export_factored
from sltrain_dist.tools.import_hf import Errors, factorize
from sltrain_dist.tools.import_reference import SPLORA, open_reference
from sltrain_dist.tools.inference import choose_device
from sltrain_dist.tools.weights import Pretrained, merge, open_pretrained
from sltrain_dist.train.flags import DTYPES, FLAGS, Parser
from sltrain_dist.utils.errors import UserError

NAMES = ("rank", "sp_ratio", "lora_alpha", "support", "block_size", "seed")  # of --method sltrain
HELP = {
    "rank": "columns of B [hidden size / 4]",
    "seed": "of the support [42]",
}  # not as in training
_FLAG = "SOURCE"


def parser() -> argparse.ArgumentParser:
    """The command line. What says how to factorise is absent from the namespace where it is not given."""
    result = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    result.add_argument(
        "source", help="folder: an HF LLaMA, a reference checkpoint, or weights of ours"
    )
    result.add_argument(
        "--from", dest="origin", choices=("hf", "reference", "auto"), default="auto",
        help=f"what the folder is [auto: reference where it holds {SPLORA}]",
    )  # fmt: skip
    result.add_argument("--output", required=True, help="a new folder")
    result.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="of the tensors [float32]"
    )
    result.add_argument("--max_shard_size", default=SHARD_SIZE, help=f"of a file [{SHARD_SIZE}]")
    result.add_argument(
        "--method", choices=("full", "low_rank", "sltrain"), help="what dense weights become [full]"
    )
    result.add_argument(
        "--device", help="where low_rank and sltrain are computed [CUDA where there is any]"
    )
    for name in NAMES:
        flag = FLAGS[name]
        text = HELP.get(name, f"{flag.help} [{flag.default}]")
        result.add_argument(f"--{name}", type=flag.kind or str, choices=flag.choices, help=text)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Import and print a summary; 0, or 2 after a user's error."""
    try:
        given = vars(parser().parse_args(arguments))
        source, errors = read(given)
        options = (DTYPES[given["dtype"]], given["max_shard_size"])
        done = export_factored(source, Path(given["output"]), *options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([f"method      {source.method.method}", *done.lines()]))
    if errors is not None:
        print("\n".join(errors.lines()))
    if source.tokenizer is None:
        print("note        no tokenizer was found beside the weights, none was written")
    return 0


def read(given: dict[str, Any]) -> tuple[Pretrained, Errors | None]:
    """The weights to write, and the errors of a factorisation, complete once they are written.

    Raises:
        UserError: a source that is not what --from says, flags that do not go together.
    """
    folder = Path(given["source"])
    wanted = [name for name in ("method", *NAMES) if name in given]
    origin = given["origin"]
    if origin == "auto":
        origin = "reference" if (folder / SPLORA).is_file() else "hf"
    if origin == "reference":
        if not folder.is_dir():
            raise UserError(
                f"{_FLAG} {folder}: no such folder; give one of the reference implementation"
            )
        if wanted:
            raise UserError(
                f"--{wanted[0]} {given[wanted[0]]}: a reference checkpoint has its own; leave it out"
            )
        return open_reference(folder, _FLAG), None
    source = open_pretrained(folder, _FLAG)
    if given["origin"] == "hf" and source.kind != "hf":
        raise UserError(f"--from hf: {folder} holds weights of ours; give --from auto")
    if given.get("method", "full") == "full":
        extra = [name for name in wanted if name != "method"]
        if extra:
            name = extra[0]
            raise UserError(
                f"--{name} {given[name]}: dense weights have none; add --method sltrain"
            )
        return merge(source), None
    for name in ("sp_ratio", "support", "block_size", "seed"):
        if name in given and given["method"] == "low_rank":
            raise UserError(
                f"--{name} {given[name]}: is of S, which --method low_rank has not; leave it out"
            )
    method = _method(given, source.model.hidden_size)
    return factorize(source, method, choose_device(given.get("device")))


def _method(given: dict[str, Any], hidden_size: int) -> MethodConfig:
    """The method that dense weights become; rank is a quarter of the width unless given."""
    settings = {name: given.get(name, FLAGS[name].default) for name in NAMES}
    settings["rank"] = settings["rank"] if "rank" in given else max(1, hidden_size // 4)
    for name in ("rank", "lora_alpha", "block_size"):
        if not 0 < settings[name] < 2**31:
            raise UserError(f"--{name} {settings[name]}: must be positive")
    if not 0 <= settings["seed"] < 2**31:
        raise UserError(f"--seed {settings['seed']}: must lie in [0, {2**31})")
    return MethodConfig(
        method=given["method"],
        rank=settings["rank"],
        density=settings["sp_ratio"],
        alpha=settings["lora_alpha"],
        support=settings["support"],
        block_size=settings["block_size"],
        seed=settings["seed"],
    )


if __name__ == "__main__":
    sys.exit(main())
