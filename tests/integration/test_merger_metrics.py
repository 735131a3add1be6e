"""The merger's metrics over fake agents: labels are bounded, and stalls add up."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from fakes.fake_merging_agent import FakeMergingAgent, random_pages
from helpers.merger_host import MergerHost, store_directory
from prometheus_client.core import Metric

from samepage.daemon import wire
from samepage.daemon.wire import PAGE_SIZE
from samepage_merger import metrics


@pytest.fixture
def store() -> Iterator[Path]:
    with store_directory() as path:
        yield path


@pytest.fixture
async def host(tmp_path: Path, store: Path) -> AsyncIterator[MergerHost]:
    host = MergerHost(tmp_path, store)
    yield host
    host.stop()
    gc.collect()


@pytest.fixture
async def agent(host: MergerHost) -> AsyncIterator[FakeMergingAgent]:
    agent = FakeMergingAgent(host.path)
    await agent.connect()
    yield agent
    await agent.die()


def collect(host: MergerHost) -> dict[str, Metric]:
    found = metrics.collect(host.domains, host.stores, host.agents, host.engine)
    return {family.name: family for family in found}


def by(label: str, family: Metric) -> dict[str, float]:
    return {sample.labels[label]: sample.value for sample in family.samples}


async def test_the_largest_domains_have_a_label(
    host: MergerHost, agent: FakeMergingAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "DOMAINS_MAX", 2)
    for number, pages in enumerate((10, 30, 5, 20)):
        data = random_pages(1, pages)
        domain = f"team-{number}"
        arenas = [await agent.open(f"{name}-{number}", data, domain) for name in "ab"]
        await host.merge(arenas, [(0, 1, 0, 0, pages)], domain)
    found = collect(host)
    assert by("domain", found["samepage_merger_shared_pages"]) == {
        "team-1": 60,
        "team-3": 40,
        "_other": 30,
    }
    assert by("domain", found["samepage_merger_saved_bytes"]) == {
        "team-1": 30 * PAGE_SIZE,
        "team-3": 20 * PAGE_SIZE,
        "_other": 15 * PAGE_SIZE,
    }
    stored = by("domain", found["samepage_merger_store_bytes"])
    assert stored == by("domain", found["samepage_merger_saved_bytes"])
    assert by("outcome", found["samepage_merger_page_outcomes"])["merged"] == 130
    [candidates] = found["samepage_merger_candidate_pages"].samples
    assert candidates.value == 65


async def test_a_store_of_an_earlier_merger_has_no_name(host: MergerHost) -> None:
    assert by("domain", collect(host)["samepage_merger_store_bytes"]) == {"_other": 0}


async def test_stalls_of_all_agents_together(host: MergerHost, agent: FakeMergingAgent) -> None:
    other = FakeMergingAgent(host.path)
    await other.connect()
    for number, sender in enumerate((agent, other, other)):
        counts = [0] * wire.STALL_BUCKETS
        counts[0], counts[7], counts[-1] = 1, 10, number
        sender.send(wire.Type.STALLS, 0, wire.STALLS.pack(*counts))
        await sender.flushed()
    buckets = by("le", collect(host)["samepage_merger_stall_seconds"])
    assert [float(bound) for bound in buckets][:2] == [8e-6, 16e-6]
    assert buckets["8e-06"] == 3 and buckets["0.001024"] == 33 and buckets["+Inf"] == 36
    assert len(buckets) == wire.STALL_BUCKETS
    await other.die()


async def test_who_announces_again_has_reconnected(
    host: MergerHost, agent: FakeMergingAgent
) -> None:
    arenas = [await agent.open(name, random_pages(1, 5)) for name in ("a", "b")]
    await host.merge(arenas, [(0, 1, 0, 0, 5)])
    await agent.disconnect()
    await agent.connect()
    for arena in arenas:
        await agent.announce(arena)
    found = collect(host)
    assert found["samepage_merger_agent_connections"].samples[0].value == 2
    assert found["samepage_merger_agent_reconnects"].samples[0].value == 1
    assert by("state", found["samepage_merger_arenas"]) == {"open": 2, "announcing": 0, "limbo": 0}
