#!/usr/bin/env python
"""Continue text with a trained model: python launcher/generate.py runs/RUN --prompt "def " (or: echo "def " | ...).

The text goes to standard output, what it cost and why it ended to standard error. Exit codes: 0 done,
2 an error that the user can mend, 1 anything else.
"""

import os
import sys

# Threads that spin while they wait bring a machine shared with anyone else to a crawl. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from typing import Any

from sltrain_dist.train.flags import Parser, tool_parser
from sltrain_dist.utils.errors import UserError, report

FLAGS: dict[str, dict[str, Any]] = {
    "model": {"metavar": "MODEL", "help": "run folder, one of its step_N, an export, or an HF LLaMA folder"},
    "--prompt": {"action": "append", "help": "text to continue, repeatable; else standard input; empty: a new document"},
    "--max_new_tokens": {"type": int, "default": 128, "help": "tokens at most, per prompt [128]"},
    "--temperature": {"type": float, "help": "divides the logits; 0: greedy [0.8]"},
    "--top_k": {"type": int, "help": "draw from so many of the most probable tokens; 0: all [0]"},
    "--top_p": {"type": float, "help": "draw from the fewest tokens that have so much of the probability [1.0]"},
    "--greedy": {"action": "store_true", "help": "always the most probable token: --temperature 0"},
    "--seed": {"type": int, "default": 0, "help": "of the first prompt's draws; every next prompt has one more [0]"},
    "--merged": {"action": "store_true", "help": "first merge every linear into one dense W"},
    "--factored": {"action": "store_true", "help": "keep the sparse and low-rank factors [as stored]"},
    "--dtype": {"help": "float32 or bfloat16 [bfloat16 on CUDA, else float32]"},
    "--device": {"help": "cpu, cuda or cuda:N [CUDA where there is any]"},
    "--tokenizer": {"help": "HF name or path [the model's own]"},
    "--stream": {"action": "store_true", "default": None, "help": "write every word as it comes [on a terminal]"},
    "--no-stream": {"dest": "stream", "action": "store_false", "help": "write each text at its end"},
}  # fmt: skip


def parser() -> Parser:
    """The command line."""
    return tool_parser("generate.py", __doc__, FLAGS)


def main(arguments: list[str]) -> int:
    """Parse, read the prompt, generate."""
    try:
        given = vars(parser().parse_args(arguments))
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "generate.py writes from one process: start it with python, not with torchrun"
            )

        from sltrain_dist.tools.generate import Request, generate, piped_text
        from sltrain_dist.tools.inference import merged_flag
        from sltrain_dist.tools.sampling import make_sampling

        given["sampling"] = make_sampling(
            *(given.pop(name) for name in ("greedy", "temperature", "top_k", "top_p"))
        )
        given["merged"] = merged_flag(given["merged"], given.pop("factored"))
        prompts = given.pop("prompt")
        piped = piped_text(sys.stdin, prompts is not None)
        given["prompts"] = tuple(prompts or [piped or ""])
        if given["stream"] is None:
            given["stream"] = sys.stdout.isatty()
        generate(Request(**given), sys.stdout, sys.stderr)
    except UserError as error:
        return report(str(error))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
