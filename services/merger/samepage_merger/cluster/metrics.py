"""Prometheus metrics of pages that are elsewhere (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric

from samepage.daemon.metrics import counter, gauge
from samepage_merger.cluster.elsewhere import Elsewhere
from samepage_merger.cluster.eviction import OUTCOME_NAMES
from samepage_merger.cluster.spill import Spill, SpillCounts


def collect(elsewhere: Elsewhere) -> Iterable[Metric]:
    """Return what there is to tell now."""
    status = elsewhere.status()
    yield gauge(
        "samepage_merger_away_pages",
        "Arena pages whose bytes are on other hosts, or in the spill files.",
        status["away_pages"],
    )
    yield gauge(
        "samepage_merger_held_elsewhere_digests",
        "Digests that other hosts hold for this one.",
        status["held_elsewhere"],
    )
    yield counter(
        "samepage_merger_evicted_pages",
        "Pages that were to be evicted by what became of them.",
        dict(zip(OUTCOME_NAMES, elsewhere.evictor.outcomes.tolist(), strict=True)),
        "outcome",
    )
    yield counter(
        "samepage_merger_returned_pages", "Away pages that were filled.", status["returned_total"]
    )
    yield gauge(
        "samepage_merger_awaited_pages",
        "Away pages that are wanted and have not come.",
        elsewhere.returner.waiting,
    )
    yield counter(
        "samepage_merger_lost_pages",
        "Away pages whose bytes nobody had any more: their applications get errors.",
        status["lost_total"],
    )
    yield counter(
        "samepage_merger_secured_pages",
        "Away pages that were made safe anew, since a holder was lost or wanted to let go.",
        elsewhere.keeper.secured,
    )
    yield from _spill(elsewhere.spill)


def _spill(spill: Spill | None) -> Iterable[Metric]:
    pages, used = (len(spill), spill.used_bytes) if spill is not None else (0, 0)
    yield gauge("samepage_merger_spill_pages", "Pages in the spill files.", pages)
    yield gauge("samepage_merger_spill_bytes", "Bytes that the spill files take on disk.", used)
    counts = spill.counts if spill is not None else SpillCounts()
    outcomes = {
        "written": counts.written,
        "read": counts.read,
        "no_room": counts.no_room,
        "bad": counts.bad,
    }
    yield counter(
        "samepage_merger_spill_page_outcomes",
        "Pages written to and read from the spill files, and what went wrong: no room for them,"
        " bytes that do not have their digest.",
        outcomes,
        "outcome",
    )
    yield counter(
        "samepage_merger_spill_errors", "Reads and writes that the disk failed.", counts.errors
    )
