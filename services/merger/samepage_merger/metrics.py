"""The merger's Prometheus metrics (docs/metrics.md)."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable

from prometheus_client.core import Metric

from samepage.daemon import wire
from samepage.daemon.metrics import counter, gauge, histogram
from samepage_merger.agents import Agents
from samepage_merger.arena import State
from samepage_merger.cluster.answering import Answers
from samepage_merger.cluster.fetch import Fetcher
from samepage_merger.cluster.hosts import Hosts
from samepage_merger.domains import Domain, Domains
from samepage_merger.merging import MergeEngine
from samepage_merger.pairs import OUTCOME_NAMES
from samepage_merger.store import StoreDirectory

#: Domains that get a label of their own; what the others have is summed up as OTHER_DOMAINS.
DOMAINS_MAX = 100
OTHER_DOMAINS = "_other"

_STALL_SECONDS = [8e-6 * 2**bucket for bucket in range(wire.STALL_BUCKETS - 1)]


def collect(
    domains: Domains, stores: StoreDirectory, agents: Agents, engine: MergeEngine
) -> Iterable[Metric]:
    """Return what there is to tell now."""
    yield from _agents(domains, agents)
    yield from _domains(list(domains))
    yield gauge(
        "samepage_merger_store_limit_bytes",
        "What all stores may hold together.",
        stores.limit_bytes,
    )
    yield from _work(list(domains), agents, engine)


def _agents(domains: Domains, agents: Agents) -> Iterable[Metric]:
    yield gauge("samepage_merger_agents", "Agents connected.", len(agents))
    yield gauge(
        "samepage_merger_older_agents",
        "Agents connected whose library speaks an older version of the protocol.",
        agents.older(),
    )
    yield counter(
        "samepage_merger_agent_connections", "Connections of agents so far.", agents.connections
    )
    yield counter(
        "samepage_merger_agent_reconnects",
        "Connections on which an agent announced arenas again.",
        agents.reconnects,
    )
    states = Counter(arena.state for domain in domains for arena in domain.arenas)
    yield gauge(
        "samepage_merger_arenas",
        "Arenas, by state: open, announcing (again), limbo (the connection broke).",
        {state.name.lower(): states[state] for state in State if state is not State.CLOSED},
        "state",
    )


def _domains(domains: list[Domain]) -> Iterable[Metric]:
    shared = {domain: domain.books.shared_pages() for domain in domains}
    slots = {domain: domain.books.table.referenced() for domain in domains}
    named = (domain for domain in domains if domain.name)
    largest = heapq.nlargest(DOMAINS_MAX, named, key=lambda domain: (shared[domain], domain.name))
    labels = {domain: domain.name for domain in largest}

    def by_label(values: dict[Domain, int]) -> Counter[str]:
        sums = Counter({OTHER_DOMAINS: 0})
        for domain, value in values.items():
            sums[labels.get(domain, OTHER_DOMAINS)] += value
        return sums

    yield gauge(
        "samepage_merger_shared_pages",
        "Arena pages that map a slot.",
        by_label(shared),
        "domain",
    )
    yield gauge(
        "samepage_merger_saved_bytes",
        "Bytes that sharing saves: (shared pages - slots in use) * 4096.",
        by_label({domain: (shared[domain] - slots[domain]) * wire.PAGE_SIZE for domain in domains}),
        "domain",
    )
    yield gauge(
        "samepage_merger_store_bytes",
        "Memory (or swap) that the store takes.",
        by_label({domain: domain.store.resident_bytes() for domain in domains}),
        "domain",
    )


def _work(domains: list[Domain], agents: Agents, engine: MergeEngine) -> Iterable[Metric]:
    yield counter(
        "samepage_merger_candidate_pages",
        "Pages that the scanner asked to merge with others.",
        engine.candidates,
    )
    yield counter(
        "samepage_merger_page_outcomes",
        "Pages of candidates by what became of them.",
        dict(zip(OUTCOME_NAMES, engine.outcomes.tolist(), strict=True)),
        "outcome",
    )
    yield counter(
        "samepage_merger_replaced_pages",
        "Pages replaced by a slot, or given back for being zero.",
        sum(domain.merged for domain in domains),
    )
    yield counter(
        "samepage_merger_restored_pages",
        "Pages made private again: written, or unshared.",
        sum(domain.restored for domain in domains),
    )
    yield histogram(
        "samepage_merger_stall_seconds",
        "How long threads of applications waited for a page, as their agents say.",
        _STALL_SECONDS,
        agents.stalls,
    )


def collect_cluster(
    domains: Domains, hosts: Hosts, fetcher: Fetcher, answers: Answers
) -> Iterable[Metric]:
    """Return what there is to tell of pages that cross hosts."""
    yield gauge(
        "samepage_merger_held_pages",
        "Pages that are held for other hosts, each as often as it is held.",
        sum(len(domain.holds) for domain in domains),
    )
    yield counter("samepage_merger_sent_pages", "Pages sent to other hosts.", answers.sent)
    yield counter(
        "samepage_merger_fetched_pages",
        "Pages fetched from other hosts, and what their digests said.",
        {"good": fetcher.counts.fetched, "wrong": fetcher.counts.wrong},
        "digest",
    )
    yield counter(
        "samepage_merger_slow_fetches",
        "Times that pages were asked of a second host, since the first was slow.",
        fetcher.counts.slow,
    )
    yield gauge(
        "samepage_merger_avoided_hosts",
        "Hosts that are asked for no pages now: they sent wrong ones, or did not answer.",
        sum(host.avoided for host in hosts.all()),
    )
    yield gauge(
        "samepage_merger_unreachable_hosts",
        "Hosts whose data connections cannot be reached: pages come from them over gRPC, slower.",
        sum(host.unreachable for host in hosts.all()),
    )
