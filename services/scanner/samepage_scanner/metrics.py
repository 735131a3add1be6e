"""The scanner's Prometheus metrics (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric

from samepage.daemon.metrics import counter, gauge
from samepage.daemon.policies import Policies
from samepage_scanner.books import Books
from samepage_scanner.config import Config
from samepage_scanner.merging import MergerClient
from samepage_scanner.passes import Passes
from samepage_scanner.publisher import Publisher


def collect(
    books: Books,
    passes: Passes,
    merger: MergerClient,
    publisher: Publisher | None,
    policies: Policies[Config],
) -> Iterable[Metric]:
    """Return what there is to tell now."""
    yield from _books(books)
    yield from _passes(passes, policies)
    yield from _connections(merger, publisher)


def _books(books: Books) -> Iterable[Metric]:
    yield gauge("samepage_scanner_agents", "Agents connected.", len(books.agents))
    yield counter(
        "samepage_scanner_agent_connections", "Connections of agents so far.", books.connections
    )
    arenas = sum(len(domain.arenas) for domain in books.domains.values())
    yield gauge("samepage_scanner_arenas", "Arenas looked after.", arenas)
    yield gauge("samepage_scanner_pages", "Their pages, touched or not.", books.pages)
    yield counter(
        "samepage_scanner_scanned_pages", "Fingerprints that agents made.", books.pages_scanned
    )


def _passes(passes: Passes, policies: Policies[Config]) -> Iterable[Metric]:
    yield from passes.seconds.collect()
    yield counter("samepage_scanner_shares", "Shares that were asked for.", passes.shares)
    yield counter(
        "samepage_scanner_candidate_pages",
        "Pages that matching found equal to others, or zero.",
        passes.merges.candidates,
    )
    yield gauge(
        "samepage_scanner_interval_seconds",
        "From the beginning of a background pass to the next, as it is now.",
        passes.interval,
    )
    yield counter(
        "samepage_scanner_background_cpu_seconds",
        "What background passes spent: scanner, agents and merger together.",
        passes.budget.spent,
    )
    yield gauge(
        "samepage_scanner_background_cpu_limit_cores",
        "What they may spend, in cores: the policy cpu_percent / 100.",
        policies.current.cpu_percent / 100,
    )


def _connections(merger: MergerClient, publisher: Publisher | None) -> Iterable[Metric]:
    yield gauge(
        "samepage_scanner_connected",
        "Whether the other service answers: 1 or 0.",
        {
            "merger": float(merger.connected),
            "index": float(publisher is not None and publisher.connected),
        },
        "to",
    )
    yield counter(
        "samepage_scanner_connections",
        "Connections that came about so far; reconnects are all but the first.",
        {
            "merger": merger.connections,
            "index": publisher.connections if publisher is not None else 0,
        },
        "to",
    )
    yield gauge(
        "samepage_scanner_published_fingerprints",
        "Distinct fingerprints of this host that the index has.",
        publisher.published if publisher is not None else 0,
    )
