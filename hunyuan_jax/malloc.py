"""Memory that a process has freed and still holds."""

import ctypes
import sys


def trim() -> None:
    """Gives what is free on the heap back to the system; takes some hundredths of a second for
    each GB.

    glibc keeps it otherwise, in a heap for each few threads: 0.3 GB after XLA:CPU has compiled a
    small model's step, and more after each of the first saves, whose threads do not find the free
    memory of others.
    """
    if sys.platform == "linux" and (
        malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)
    ):  # not in musl
        malloc_trim(0)
