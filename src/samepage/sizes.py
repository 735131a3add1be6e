"""Sizes of memory as people write them, and what the machine has."""

from __future__ import annotations

import operator
import re
import resource
from decimal import Decimal
from pathlib import Path
from typing import SupportsIndex

from samepage.errors import InvalidArgumentError, OutOfMemoryError

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_WRITTEN = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", re.ASCII)
_HELP = 'give bytes as a whole number, or text such as "512MiB" or "1.5GiB"'
# What the kernel gives a process on the processors that samepage runs on.
ADDRESS_SPACE_BYTES = 2**47


def parse_size(size: int | str) -> int:
    """Return a size in bytes, of bytes or of text such as "512MiB" (KiB, MiB, GiB, TiB; kB, ...).

    Raises:
        InvalidArgumentError: it is no size, or no positive whole number of bytes.
    """
    count = _parse_text(size) if isinstance(size, str) else _parse_number(size)
    if count <= 0:
        raise InvalidArgumentError(f"a size of {size!r} is not positive: {_HELP}")
    return count


def _parse_number(size: object) -> int:
    if not isinstance(size, SupportsIndex) or isinstance(size, bool):
        raise InvalidArgumentError(f"{size!r} is no size: {_HELP}")
    return operator.index(size)


def _parse_text(size: str) -> int:
    match = _WRITTEN.fullmatch(size)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise InvalidArgumentError(f"{size!r} is no size: {_HELP}")
    count = Decimal(match[1]) * unit
    if count != int(count):
        raise InvalidArgumentError(f"{size!r} is no whole number of bytes: {_HELP}")
    return int(count)


def memory_bytes() -> int:
    """Return the machine's memory and swap, in bytes."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))


def check_fits(size: int) -> None:
    """See that an arena of `size` bytes has a chance on this machine, before anything is mapped.

    Raises:
        OutOfMemoryError: it is larger than the address space, or than memory and swap.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    space = ADDRESS_SPACE_BYTES if limit == resource.RLIM_INFINITY else limit
    if size > space:
        raise OutOfMemoryError(
            f"{format_size(size)} is more than the address space of a process, "
            f"{format_size(space)}: ask for less"
        )
    memory = memory_bytes()
    if size > memory:
        raise OutOfMemoryError(
            f"{format_size(size)} is more than this machine's memory and swap, "
            f"{format_size(memory)}: ask for less"
        )


def format_size(count: float) -> str:
    """Return bytes for people: "1.5 GiB"."""
    power = 0
    while abs(count) >= 1024 and power < len(_BINARY) - 1:
        count /= 1024
        power += 1
    return f"{count:.0f} {_BINARY[power]}" if power == 0 else f"{count:.1f} {_BINARY[power]}"
