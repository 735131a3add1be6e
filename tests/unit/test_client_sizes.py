"""Sizes as people write them."""

from __future__ import annotations

import resource
import subprocess
import sys

import numpy as np
import pytest

from samepage.errors import InvalidArgumentError, OutOfMemoryError
from samepage.sizes import check_fits, format_size, memory_bytes, parse_size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1", 1),
        ("4096", 4096),
        ("512MiB", 512 * 2**20),
        ("512 mib", 512 * 2**20),
        (" 1GiB ", 2**30),
        ("1.5GiB", 3 * 2**29),
        ("2TiB", 2**41),
        ("64KiB", 2**16),
        ("64kB", 64_000),
        ("1MB", 10**6),
        ("1GB", 10**9),
        ("12B", 12),
    ],
)
def test_text(text: str, count: int) -> None:
    assert parse_size(text) == count


def test_whole_numbers() -> None:
    assert parse_size(4096) == 4096
    assert parse_size(int(np.int64(12))) == 12


@pytest.mark.parametrize("size", [0, -1, "0", "0MiB", "0.0GiB", -(2**70)])
def test_what_is_not_positive(size: int | str) -> None:
    with pytest.raises(InvalidArgumentError, match="not positive"):
        parse_size(size)


@pytest.mark.parametrize(
    "size", ["", "MiB", "big", "1 2", "-1", "1e9", "512M", "1,5GiB", "0x10", "٣", "1.GiB", "nan"]
)
def test_what_is_no_size(size: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r'is no size.*"512MiB"'):
        parse_size(size)


@pytest.mark.parametrize("size", [1.5, None, True, b"1MiB", [1]])
def test_what_is_of_another_type(size: object) -> None:
    with pytest.raises(InvalidArgumentError, match="is no size"):
        parse_size(size)  # type: ignore[arg-type]


def test_parts_of_a_byte() -> None:
    with pytest.raises(InvalidArgumentError, match="whole number of bytes"):
        parse_size("1.0001KiB")


def test_what_fits() -> None:
    check_fits(1)
    check_fits(memory_bytes())
    with pytest.raises(OutOfMemoryError, match="memory and swap"):
        check_fits(memory_bytes() + 1)
    with pytest.raises(OutOfMemoryError, match="address space"):
        check_fits(2**47 + 1)


def test_the_limit_of_the_address_space_counts() -> None:
    code = (
        "import resource, sys; from samepage import sizes, OutOfMemoryError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "try: sizes.check_fits(2**30 + 1)\n"
        "except OutOfMemoryError as error: sys.exit(0 if '1.0 GiB' in str(error) else 1)\n"
        "sys.exit(2)"
    )
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 * 2**29, "1.5 GiB"),
        (2**70, "1024.0 EiB"),
    ],
)
def test_for_people(count: int, text: str) -> None:
    assert format_size(count) == text
