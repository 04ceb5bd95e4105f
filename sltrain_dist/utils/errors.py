"""Exceptions that end a run with a single line, without a traceback, and how that line is printed once."""

import os
import sys
import time


class UserError(Exception):
    """Bad input. The message is one line: the flag or file, its value, what is wrong, and the mend."""


class FaultError(Exception):
    """Another rank, a host or a disk failed: nothing that this process could mend, but a restart may.

    ``speaks``: whether this rank is the one that prints it; rank 0 may be the one that is gone.
    """

    def __init__(self, message: str, speaks: bool) -> None:
        super().__init__(message)
        self.speaks = speaks


def report(message: str, code: int = 2, speaks: bool | None = None) -> int:
    """Print an error once: every rank has it, one speaks (None: rank 0). Returns the exit code; 2 is a user's error."""
    if int(os.environ.get("RANK", "0")) == 0 if speaks is None else speaks:
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # launchers kill all ranks when one ends: let the first one speak
    return code
