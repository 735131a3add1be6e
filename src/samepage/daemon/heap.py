"""The heap's habit of keeping what was freed, broken where large arrays have come and gone."""

from __future__ import annotations

import ctypes

_libc = ctypes.CDLL(None)

# mallopt's numbers (malloc.h).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT_BYTES = 64 << 20
_LARGEST_BYTES = 32 << 20


def keep() -> None:
    """Keep freed memory for the next large buffers, until `trim`: each page that is given back is
    a page fault, and a page to clear, when it is taken again."""
    if hasattr(_libc, "mallopt"):  # glibc has it
        _libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        _libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)


def trim() -> None:
    """Give freed memory back to the kernel: what the C library keeps of it counts as books."""
    if hasattr(_libc, "malloc_trim"):  # glibc has it
        _libc.malloc_trim(ctypes.c_size_t(0))
