"""Host memory that was freed, back to the operating system.

glibc keeps freed pieces below its mmap threshold (up to 32 MiB) for later; pieces that outlive a block's gathered weights
end up between them, so that the heap grows with every block though nothing more is in use.
"""

import ctypes
import functools
from collections.abc import Callable


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # another C library
        return None


def return_freed_memory() -> None:
    """Give the pages of freed memory back; nothing where the C library cannot."""
    if (trim := _trim()) is not None:
        trim(0)
