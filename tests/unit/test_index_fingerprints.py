"""Where fingerprints go: against a plain Python oracle, and evenly."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samepage_index.fingerprints import KEY_BYTES, SHARDS, group, place

MASK = (1 << 64) - 1
CONSTANTS = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0x8CB92BA72F3D8DD7)


def oracle(fingerprint: bytes) -> tuple[int, int]:
    def mix(word: int, key: int) -> int:
        word = (word + key) & MASK
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
        return word ^ (word >> 31)

    left, right = struct.unpack(">QQ", fingerprint)
    left ^= mix(right, CONSTANTS[0])
    right ^= mix(left, CONSTANTS[1])
    left ^= mix(right, CONSTANTS[2])
    return left >> 58, right


FINGERPRINTS = st.lists(st.binary(min_size=16, max_size=16), max_size=50)


@given(FINGERPRINTS)
def test_place_agrees_with_the_oracle(fingerprints: list[bytes]) -> None:
    shards, keys = place(b"".join(fingerprints))
    assert list(zip(shards.tolist(), keys.tolist(), strict=True)) == list(map(oracle, fingerprints))


@given(FINGERPRINTS)
def test_group_is_a_partition_that_keeps_order(fingerprints: list[bytes]) -> None:
    found: dict[int, tuple[int, int]] = {}
    shards = []
    for part in group(b"".join(fingerprints)):
        keys = struct.unpack(f"<{len(part.keys) // KEY_BYTES}Q", part.keys)
        assert part.positions.tolist() == sorted(part.positions.tolist())
        found |= {
            position: (part.shard, key)
            for position, key in zip(part.positions.tolist(), keys, strict=True)
        }
        shards.append(part.shard)
    assert shards == sorted(set(shards))
    assert found == dict(enumerate(map(oracle, fingerprints)))


def test_values_never_change() -> None:
    # What is in Redis was placed by other releases.
    assert oracle(bytes(16)) == (11, 3454618561189201622)
    assert oracle(bytes(range(16))) == (24, 9363879266888762306)


@pytest.mark.parametrize("kind", ["counting", "high words", "low bits zero"])
def test_spreads_evenly_whatever_fingerprints_look_like(kind: str) -> None:
    count = 64_000
    words = np.zeros((count, 2), ">u8")
    numbers = np.arange(count)
    if kind == "counting":
        words[:, 1] = numbers
    elif kind == "high words":
        words[:, 0] = numbers
    else:
        words[:, 1] = numbers << 20
    shards, keys = place(words.tobytes())
    assert len(set(zip(shards.tolist(), keys.tolist(), strict=True))) == count
    for bits in (shards, keys & np.uint64(63), keys >> np.uint64(58)):
        counts = np.bincount(bits.astype(np.int64), minlength=SHARDS)
        assert counts.min() > 800
        assert counts.max() < 1200
