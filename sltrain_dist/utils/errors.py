"""The one exception that means "the user can mend this": printed as a single line, without a traceback."""

import os
import sys
import time


class UserError(Exception):
    """Bad input. The message is one line: the flag or file, its value, what is wrong, and the mend."""


def report(message: str) -> int:
    """Print a user's error once: every rank has it, the first one speaks. Returns the exit code, 2."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # launchers kill all ranks when one ends: let the first one speak
    return 2
