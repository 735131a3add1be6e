"""The binding: fingerprints against another implementation, and what the kernel offers."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import needs
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from samepage import errors, native

PAGE = 4096


def expected(data: bytes, seed: int) -> list[bytes]:
    return [
        xxhash.xxh3_128_digest(data[at : at + PAGE], seed=seed) for at in range(0, len(data), PAGE)
    ]


@given(pages=st.integers(0, 5), seed=st.integers(0, 2**64 - 1), content=st.integers(0, 2**32))
def test_fingerprints_are_xxh3(pages: int, seed: int, content: int) -> None:
    data = random.Random(content).randbytes(pages * PAGE)
    found = native.fingerprint(data, pages, seed)
    assert found.shape == (pages, 16)
    assert [row.tobytes() for row in found] == expected(data, seed)


def test_fingerprints_of_a_read_only_unaligned_part() -> None:
    data = os.urandom(3 * PAGE + 7)
    found = native.fingerprint(memoryview(data)[7:], 2, 3)
    assert [row.tobytes() for row in found] == expected(data[7 : 7 + 2 * PAGE], 3)


def test_fingerprints_refuse_what_is_not_there() -> None:
    with pytest.raises(errors.InvalidArgumentError, match="do not hold"):
        native.fingerprint(bytes(PAGE), 2, 0)
    with pytest.raises(errors.InvalidArgumentError, match="do not hold"):
        native.fingerprint(bytes(PAGE), -1, 0)
    with pytest.raises(errors.InvalidArgumentError, match="seed"):
        native.fingerprint(bytes(PAGE), 1, 2**64)


def test_a_large_array() -> None:
    data = np.arange(64 * PAGE // 8, dtype=np.uint64)
    found = native.fingerprint(data, 64, 1)
    assert [row.tobytes() for row in found] == expected(data.tobytes(), 1)


def test_every_errno_has_its_own_words() -> None:
    for number, kind in native.ERRORS.items():
        with pytest.raises(kind):
            native._check(-number)
    with pytest.raises(errors.ShareTimeoutError):
        native._check(-errno.ETIMEDOUT, {errno.ETIMEDOUT: errors.ShareTimeoutError})
    native._check(0)
    native._check(7)


@pytest.mark.needs("root")
def test_probe_agrees_with_the_kernel() -> None:
    found = native.probe()
    for feature in native.Feature:
        name = (feature.name or "").lower()
        assert (feature in found) == needs.NEEDS[name].present(), name


def test_features_can_be_taken_away() -> None:
    code = "from samepage import native; print(int(native.probe()))"
    every = ",".join((feature.name or "").lower() for feature in native.Feature)
    environment = {**os.environ, "SAMEPAGE_DISABLE": every}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == 0


def test_a_library_that_is_not_there(tmp_path: Path) -> None:
    code = (
        "import samepage\ntry: samepage.connect('/tmp')\n"
        "except samepage.SamepageError as error: print(error)"
    )
    environment = {**os.environ, "SAMEPAGE_LIBRARY": str(tmp_path / "none.so")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "make native" in done.stdout and "none.so" in done.stdout
