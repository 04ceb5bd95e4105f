#!/usr/bin/env python
"""What a run will take before it is started: python launcher/plan.py --gpus 8 --model llama_7b ... (pretrain's flags).

Memory of a rank by kind, bytes on the wire, FLOPs and time of an update. Needs no GPU, no corpus and no
other rank. All flags that are not listed here are pretrain.py's; their --help is there.
Exit codes: 0 done, 2 an error that the user can mend, or a plan above --gpu_memory, 1 anything else.
"""

import os
import sys
from typing import Any

# Threads that spin while they wait bring a machine shared with anyone else to a crawl. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from sltrain_dist.train.flags import Parser, tool_parser

FLAGS: dict[str, dict[str, Any]] = {
    "--gpus": {"type": int, "default": 1, "help": "ranks, of all machines together [1]"},
    "--device": {"choices": ("cpu", "cuda"), "default": "cuda", "help": "what they run on [cuda]"},
    "--gpu_memory": {"metavar": "SIZE", "help": "of one, as 24GiB or 80GB: does it fit?"},
    "--fit": {"action": "store_true", "help": "search micro-batch, checkpointing and tensor parallelism that fit"},
    "--tflops": {"type": float, "help": "10^12 operations a second that a rank reaches [400; cpu 0.1]"},
    "--bandwidth": {"type": float, "help": "10^9 bytes a second that a rank sends [100; cpu 1]"},
    "--json": {"metavar": "FILE", "help": "write the plan there, too"},
    "--png": {"metavar": "FILE", "help": "draw it there"},
}  # fmt: skip


def parser() -> Parser:
    """The command line."""
    return tool_parser("plan.py", __doc__, FLAGS)


def main(arguments: list[str]) -> int:
    """Parse, plan, print."""
    from sltrain_dist.utils.errors import UserError, report

    try:
        given, rest = parser().parse_known_args(arguments)

        from sltrain_dist.tools.plan_report import run

        run(vars(given), rest)
    except UserError as error:
        return report(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
