"""Digests of pages: BLAKE3, keyed for the domain. 32 zero bytes stand for a page of zeros.

A digest names bytes across hosts: who has 32 bytes of digest from a host that it trusts can take
the page from anybody. The library hashes several pages side by side, whatever they are
(native/src/digest.c); many are hashed in a thread, as that lets go of the interpreter's lock. A few
are hashed at once, since handing them over would take longer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from samepage import native
from samepage.daemon import wire
from samepage.daemon.wire import PAGE_SIZE
from samepage_merger.cluster.away import Bytes, Digests, Mask

DIGEST_BYTES = wire.DIGEST_BYTES
FINGERPRINT_BYTES = 16
ZERO_PAGE = bytes(PAGE_SIZE)
ZERO_DIGEST = bytes(DIGEST_BYTES)

#: A row of bytes a fingerprint.
Fingerprints = npt.NDArray[np.uint8]

T = TypeVar("T")

_THREADS = 2
_INLINE_PAGES = 4
_workers = ThreadPoolExecutor(_THREADS, "digests")


def parse_digests(packed: bytes) -> Digests:
    """Return digests from n * 32 bytes; the result is read-only."""
    return np.frombuffer(packed, np.uint8).reshape(-1, DIGEST_BYTES)


def parse_fingerprints(packed: bytes) -> Fingerprints:
    """Return fingerprints from n * 16 bytes; the result is read-only."""
    return np.frombuffer(packed, np.uint8).reshape(-1, FINGERPRINT_BYTES)


def words(digests: Digests) -> npt.NDArray[np.uint64]:
    """Return digests as rows of 4 words, of which numpy compares several times as many bytes."""
    return np.ascontiguousarray(digests).view(np.uint64)


def are_zero(digests: Digests) -> Mask:
    """Return which digests stand for a page of zeros."""
    first, second, third, fourth = words(digests).T
    zero: Mask = (first | second | third | fourth) == 0
    return zero


def equal(left: Digests, right: Digests) -> Mask:
    """Return where two arrays of the same length are equal."""
    first, second, third, fourth = (words(left) == words(right)).T
    same: Mask = first & second & third & fourth
    return same


def fingerprints(seed: int, data: Bytes) -> Fingerprints:
    """Return the fingerprints of consecutive pages, as agents make them with this seed."""
    return native.fingerprint(data, len(data) // PAGE_SIZE, seed)


async def in_thread(work: Callable[[], T], pages: int) -> T:
    """Return what `work`, which goes over so many pages, returns; run where that is fastest.

    It is not left alone with what it goes over: when this is cancelled it ends first.
    """
    if pages <= _INLINE_PAGES:
        return work()
    working = asyncio.get_running_loop().run_in_executor(_workers, work)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait({working})
        raise


class Digester:
    """Makes the digests of one domain.

    Args:
        key: the domain's (samepage.daemon.secrets.digest_key).
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def page(self, data: Bytes) -> bytes:
        """Return the digest of one page."""
        return self.pages(data).tobytes()

    def pages(self, data: Bytes) -> Digests:
        """Return the digests of consecutive pages."""
        return native.digest(data, len(data) // PAGE_SIZE, self._key)

    async def pages_apart(self, data: Bytes) -> Digests:
        """Return the digests of consecutive pages, without keeping the event loop from its work.

        Nobody may change `data` meanwhile.
        """
        return await in_thread(lambda: self.pages(data), len(data) // PAGE_SIZE)
