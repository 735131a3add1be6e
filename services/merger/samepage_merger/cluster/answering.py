"""Answers those who fetch pages from this host, on whatever way they ask."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np

from samepage.daemon.failpoints import failpoint
from samepage.daemon.wire import DIGEST_BYTES
from samepage.v1 import pages_pb2
from samepage_merger.cluster.away import Bytes
from samepage_merger.cluster.fetched import pack
from samepage_merger.cluster.local import Local
from samepage_merger.cluster.requests import checked
from samepage_merger.cluster.snapshots import Snapshots
from samepage_merger.domains import Domains

FETCH_MAX = 1024


class Answers:
    """Finds the pages that are asked for.

    Attributes:
        sent: pages sent so far.
    """

    def __init__(self, domains: Domains, local: Local, snapshots: Snapshots) -> None:
        self._domains = domains
        self._local = local
        self._snapshots = snapshots
        self.sent = 0

    @asynccontextmanager
    async def answer(self, request: pages_pb2.FetchRequest) -> AsyncIterator[Sequence[Bytes]]:
        """Give a FetchResponse in parts, which stay as they are for as long as the block runs.

        Raises:
            BadRequestError: a length is wrong.
        """
        domain = self._domains.find(request.domain_id)
        if len(request.digests) == DIGEST_BYTES and domain is not None:
            # Somebody waits for it: no arrays, and no thread.
            page = domain.catalog.page(request.digests)
            if page is not None and any(request.digests):
                self.sent += 1
                yield pack(b"\1", [page])
                return
        digests, fingerprints = checked(
            request.domain_id, request.digests, request.fingerprints, FETCH_MAX
        )
        if domain is None:
            yield pack(bytes(len(digests)), [])
            return
        with self._snapshots.offered(domain, digests) as offered:
            if offered is not None:
                found = np.ones(len(digests), np.bool_)
            else:
                found, pages = await self._local.pages(domain, digests, fingerprints)
                offered = [pages]
            self.sent += int(np.count_nonzero(found))
            failpoint("pages.found")
            yield pack(found.tobytes(), offered)
