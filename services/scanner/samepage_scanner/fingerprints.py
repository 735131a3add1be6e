"""Many fingerprints at a time, as n x 2 arrays of uint64 (16 bytes a page).

Sorting compares one 64-bit key a fingerprint: both halves folded together with a factor that is
drawn when the process starts. Agents choose what they report, and without that secret they could
make keys collide at will. Equal keys are still checked against the whole fingerprints.
"""

from __future__ import annotations

import secrets

import numpy as np
import numpy.typing as npt

Fingerprints = npt.NDArray[np.uint64]
Keys = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]

FINGERPRINT_BYTES = 16

_FACTOR = np.uint64(secrets.randbits(64) | 1)


def empty(count: int = 0) -> Fingerprints:
    """`count` fingerprints of absent pages. Takes no memory before it is written."""
    return np.zeros((count, 2), "<u8")


def parse(packed: bytes) -> Fingerprints:
    """Fingerprints from n * 16 bytes; the result is read-only."""
    return np.frombuffer(packed, "<u8").reshape(-1, 2)


def keys(fingerprints: Fingerprints) -> Keys:
    """One 64-bit sort key each; equal fingerprints have equal keys."""
    folded: Keys = fingerprints[:, 1] * _FACTOR
    folded += fingerprints[:, 0]
    return folded


def equal(left: Fingerprints, right: Fingerprints) -> Mask:
    """Where two arrays of the same length are equal."""
    mask: Mask = left[:, 0] == right[:, 0]
    mask &= left[:, 1] == right[:, 1]
    return mask


def sampled(fingerprints: Fingerprints, bits: int) -> Mask:
    """Which ones have this many (at most 64) zeros at the end, as numbers of 128 bits."""
    # Fingerprints are big-endian, the halves are read little-endian.
    low = np.uint64(int.from_bytes(((1 << bits) - 1).to_bytes(8, "big"), "little"))
    mask: Mask = (fingerprints[:, 1] & low) == 0
    return mask


def sort(fingerprints: Fingerprints) -> tuple[Indices, Mask]:
    """An order that puts equal fingerprints side by side.

    Returns:
        The order, and for each place in it whether a new fingerprint begins there.
    """
    folded = keys(fingerprints)
    order = np.argsort(folded)
    ordered = folded[order]
    alike = ordered[1:] == ordered[:-1]
    same = _same_neighbours(fingerprints, order, alike)
    if np.count_nonzero(same) != np.count_nonzero(alike):
        # Different fingerprints with one key may lie interleaved: sort by all bits instead.
        order = np.lexsort((fingerprints[:, 1], fingerprints[:, 0], folded))
        same = _same_neighbours(fingerprints, order, np.ones_like(alike))
    begins = np.ones(len(order), np.bool_)
    begins[1:] = ~same
    return order, begins


def distinct(fingerprints: Fingerprints) -> Fingerprints:
    """Each fingerprint once, ordered by key."""
    order, begins = sort(fingerprints)
    return fingerprints[order[begins]]


def contains(table: Fingerprints, table_keys: Keys, wanted: Fingerprints) -> tuple[Indices, Mask]:
    """Find fingerprints in a table from `distinct`.

    Of table entries whose keys collide (one chance in 2**64 a pair) only one is found.

    Returns:
        For each wanted one a place in the table, and whether it is there.
    """
    if not len(table):
        return np.zeros(len(wanted), np.intp), np.zeros(len(wanted), np.bool_)
    places = np.searchsorted(table_keys, keys(wanted))
    np.minimum(places, len(table) - 1, out=places)
    return places, equal(table[places], wanted)


def _same_neighbours(fingerprints: Fingerprints, order: Indices, candidates: Mask) -> Mask:
    """Which candidate places in the order hold the same fingerprint as the next place."""
    places = np.flatnonzero(candidates)
    result = candidates.copy()
    result[places] = equal(fingerprints[order[places]], fingerprints[order[places + 1]])
    return result
