"""The index's Prometheus metrics (docs/metrics.md)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from prometheus_client.core import Metric

from samepage.daemon.metrics import gauge
from samepage_index.errors import StoreUnavailableError
from samepage_index.index import Index
from samepage_index.servicer import IndexServicer

# Redis is asked for every shard's size, which it must not be by each of many scrapers.
_FRESH_SECONDS = 10.0
_PATIENCE_SECONDS = 2.0


class IndexMetrics:
    """Makes the metrics."""

    def __init__(self, index: Index, servicer: IndexServicer) -> None:
        self._index = index
        self._servicer = servicer
        self._sizes: list[Metric] = []
        self._fresh_until = 0.0
        self._asking = asyncio.Lock()

    async def collect(self) -> Iterable[Metric]:
        """Return what there is to tell now; without sizes while Redis does not tell them."""
        async with self._asking:
            if time.monotonic() >= self._fresh_until:
                self._sizes = await self._ask()
                self._fresh_until = time.monotonic() + _FRESH_SECONDS
        requests = (*self._servicer.requests.collect(), *self._servicer.errors.collect())
        redis = gauge("samepage_index_redis_up", "Whether Redis answers.", float(bool(self._sizes)))
        return [*requests, redis, *self._sizes]

    async def _ask(self) -> list[Metric]:
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                size, hosts, _ = await self._index.stats()
        except (StoreUnavailableError, TimeoutError):
            return []
        return [
            gauge(
                "samepage_index_entries",
                "(fingerprint, host) pairs stored.",
                size.entries,
            ),
            gauge(
                "samepage_index_fingerprints",
                "Distinct fingerprints stored, by domain.",
                size.fingerprints,
            ),
            gauge(
                "samepage_index_stored_bytes",
                "What Redis spends on them.",
                size.stored_bytes,
            ),
            gauge("samepage_index_hosts", "Hosts with a lease.", hosts),
        ]
