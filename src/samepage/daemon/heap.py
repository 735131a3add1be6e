"""The heap's habit of keeping what was freed, broken where large arrays have come and gone."""

from __future__ import annotations

import ctypes

_libc = ctypes.CDLL(None)


def trim() -> None:
    """Give freed memory back to the kernel: what the C library keeps of it counts as books."""
    if hasattr(_libc, "malloc_trim"):  # glibc has it
        _libc.malloc_trim(ctypes.c_size_t(0))
