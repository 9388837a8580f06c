"""What the C library does with memory that a process has freed."""

import ctypes
import os
import platform

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # M_* of malloc.h
KEPT = "keeps freed memory"
_kept = False


def keep_freed_memory() -> None:
    """glibc maps every block over 32 MB anew and returns it when it is freed: a step of training on a CPU then spends
    up to a third of its time on page faults. From here on this process keeps what it has had, and holds its peak. With
    another C library nothing happens.
    """
    global _kept
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        _kept = bool(libc.mallopt(MMAP_MAX, 0) and libc.mallopt(TRIM_THRESHOLD, -1))


def give_back_freed_memory() -> None:
    """To the system, what this process has freed and glibc holds."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def allocator() -> str | None:
    """What provenance says: what was preloaded, and whether freed memory is kept; None where neither."""
    return ", ".join([*filter(None, [os.environ.get("LD_PRELOAD", "").strip()]), *([KEPT] if _kept else [])]) or None
