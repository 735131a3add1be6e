"""The helper's Prometheus metrics (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric

from samepage.daemon.metrics import gauge
from samepage_merger.holding.held import HeldArenas


def collect(held: HeldArenas) -> Iterable[Metric]:
    """Return what there is to tell now."""
    limits = held.limits
    yield gauge("samepage_arenas_arenas", "Arenas held for clients.", len(held.arenas()))
    yield gauge("samepage_arenas_arenas_limit", "How many may be held.", limits.arenas)
    yield gauge(
        "samepage_arenas_held_bytes", "Size of all of them, touched or not.", held.held_bytes
    )
    yield gauge("samepage_arenas_held_limit_bytes", "What it may be.", limits.held_bytes)
    yield gauge("samepage_arenas_streams", "Reads and writes in flight.", held.streams)
    yield gauge("samepage_arenas_streams_limit", "How many there may be.", limits.streams)
