#!/usr/bin/env python
"""Perplexity of a trained model: python launcher/evaluate.py runs/RUN [--corpus TEXT] (or under torchrun, which shares the batches).

Without flags a run's folder gives its final loss again. Exit codes: 0 done, 2 an error that the user
can mend, 1 anything else.
"""

import os
import sys
from pathlib import Path
from typing import Any

# Threads that spin while they wait bring a machine shared with anyone else to a crawl. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from sltrain_dist.train.flags import Parser, token_count, tool_parser
from sltrain_dist.utils.errors import UserError, report

FLAGS: dict[str, dict[str, Any]] = {
    "model": {"metavar": "MODEL", "help": "run folder, one of its step_N, an export, or an HF LLaMA folder"},
    "--corpus": {"help": "as pretrain.py's [the run's]"},
    "--tokenizer": {"help": "HF name or path [the model's own]"},
    "--max_length": {"type": int, "help": "tokens per sample [the run's, else 256]"},
    "--pack": {"choices": ("packed", "padded"), "help": "documents joined, or one a sample [the run's, else packed]"},
    "--eval_tokens": {"type": token_count, "help": "tokens at most, with K, M or B [the run's, else 10M]"},
    "--batch_size": {"type": int, "help": "samples per rank at once [the run's, else 16]"},
    "--eval_mode": {"choices": ("exact", "reference"), "help": "mean over tokens, or the reference's [the run's, else exact]"},
    "--split": {"choices": ("held_out", "all"), "default": "held_out", "help": "part of the corpus [held_out]"},
    "--merged": {"action": "store_true", "help": "first merge every linear into one dense W"},
    "--factored": {"action": "store_true", "help": "keep the sparse and low-rank factors [as stored]"},
    "--dtype": {"help": "float32 or bfloat16 [the run's, else bfloat16 on CUDA, else float32]"},
    "--device": {"choices": ("cpu", "cuda"), "help": "[CUDA where there is any]"},
    "--cache_dir": {"help": "where token indices are kept [the run's, else ~/.cache/sltrain_dist]"},
    "--json": {"metavar": "FILE", "help": "write the result there, too"},
}  # fmt: skip


def parser() -> Parser:
    """The command line."""
    return tool_parser("evaluate.py", __doc__, FLAGS)


def main(arguments: list[str]) -> int:
    """Parse, evaluate, print."""
    try:
        given = vars(parser().parse_args(arguments))

        from sltrain_dist.parallel import mesh
        from sltrain_dist.tools.evaluate import Request, check_target, describe, run, write
        from sltrain_dist.tools.inference import choose_device, merged_flag

        given["merged"] = merged_flag(given["merged"], given.pop("factored"))
        target, device = given.pop("json"), choose_device(given.pop("device")).type
        if target:
            check_target(Path(target))
        world = mesh.initialise(device=device)
        try:
            result = run(Request(**given), world)
            if world.is_first:
                print(describe(result))
                if target:
                    write(Path(target), result)
        finally:
            mesh.close()
    except UserError as error:
        return report(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
