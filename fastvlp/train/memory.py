"""Keeping freed memory inside the process, so that the next step need not fault it in again."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names and numbers of glibc's malloc.h


def keep_freed_memory(largest: int = 1 << 30) -> bool:
    """Let glibc reuse blocks of up to ``largest`` bytes (at most 2 GiB) instead of handing them back to the kernel.

    By default glibc maps every block above 32 MiB at most afresh and unmaps it when it is freed, and trims the top of the heap; a training
    step then pays page faults for the same activations again and again. Returns whether the setting took; False outside glibc.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    took = libc.mallopt(_M_MMAP_THRESHOLD, min(largest, 2**31 - 1))
    return bool(took and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
