"""What the C library does with large and with freed pieces of memory."""

import ctypes
import glob
import os
import sys
from pathlib import Path

_HUGE_PAGES = "glibc.malloc.hugetlb"
_SYSTEM_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")


def trim() -> None:
    """Returns free heap memory to the system; takes some 0.01 s per GB.

    glibc keeps it otherwise: 0.3 GB after XLA:CPU has compiled a small model's step, and more
    after each of the first saves, whose threads do not reuse the free memory of other threads.
    """
    if sys.platform != "linux":
        return
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if malloc_trim:
        malloc_trim(0)


def restart_with_huge_pages() -> None:
    """Restarts this process so that malloc asks for huge pages, if it computes on a CPU.

    XLA:CPU allocates the temporaries of a program anew for each call, and every page of them is a
    fault: 128,000 a training step of 15 M parameters, a fifth of its time.  glibc reads this
    setting when a process starts.  Nothing happens where a program has no say in it (on other
    systems, or if huge pages are given to all or to none), with an accelerator, and with a setting
    that is there already (GLIBC_TUNABLES=glibc.malloc.hugetlb=0 for none).

    Call it first in a command, before any work is done.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    platforms = os.environ.get("JAX_PLATFORMS", "")
    has_accelerator = any(glob.glob(pattern) for pattern in _ACCELERATORS)
    if sys.platform != "linux" or _HUGE_PAGES in tunables:
        return
    if platforms != "cpu" and (platforms or has_accelerator):
        return
    if not hasattr(ctypes.CDLL(None), "gnu_get_libc_version") or not _SYSTEM_SETTING.exists():
        return
    if "[madvise]" not in _SYSTEM_SETTING.read_text():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{_HUGE_PAGES}=1"]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
