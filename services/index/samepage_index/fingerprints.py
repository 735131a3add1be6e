"""Where in Redis a fingerprint's entries are.

A fingerprint is mixed by three rounds of a Feistel network (a bijection of its 128 bits) and cut to
a shard number (6 bits) and a key (64 bits). The mix makes shards and buckets even whatever the
fingerprints look like: a sampled domain publishes only those whose low bits are zero. Two
fingerprints of a domain that agree in these 70 bits count as one: among a thousand million entries
that happens to one pair with a chance of 1 in 2,000, and costs one futile fetch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FINGERPRINT_BYTES = 16
KEY_BYTES = 8
SHARD_BITS = 6
SHARDS = 1 << SHARD_BITS

U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Group:
    """The fingerprints of a batch that are in one shard.

    Attributes:
        shard: its number, from 0.
        positions: their numbers in the batch.
        keys: their keys, packed, `KEY_BYTES` each, in the order of `positions`.
    """

    shard: int
    positions: npt.NDArray[np.int64]
    keys: bytes


def place(fingerprints: bytes) -> tuple[npt.NDArray[np.uint8], U64]:
    """The shard and the key of each packed fingerprint."""
    words = np.frombuffer(fingerprints, ">u8").astype(np.uint64).reshape(-1, 2)
    left, right = words[:, 0], words[:, 1]
    left = left ^ _mix(right, 0x9E3779B97F4A7C15)
    right = right ^ _mix(left, 0xD1B54A32D192ED03)
    left = left ^ _mix(right, 0x8CB92BA72F3D8DD7)
    return (left >> np.uint64(64 - SHARD_BITS)).astype(np.uint8), right


def group(fingerprints: bytes) -> Iterator[Group]:
    """The packed fingerprints by shard; shards without any are left out."""
    shards, keys = place(fingerprints)
    order = np.argsort(shards, kind="stable")
    sorted_keys = keys[order].astype("<u8").tobytes()
    ends = np.cumsum(np.bincount(shards, minlength=SHARDS)).tolist()
    start = 0
    for shard, end in enumerate(ends):
        if end > start:
            packed = sorted_keys[start * KEY_BYTES : end * KEY_BYTES]
            yield Group(shard, order[start:end], packed)
        start = end


def _mix(words: U64, key: int) -> U64:
    """The finalizer of SplitMix64."""
    mixed = words + np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
