"""share(): what agents, the merger and the report get to see."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest
from fakes.fake_agent import FakeAgent, RefusedError, random_pages
from fakes.fake_merger import FakeMerger
from helpers.scanner_host import ScannerHost

from samepage.daemon.wire import FINGERPRINT_PAGES_MAX, PAGE_SIZE, Message, PageState


@pytest.fixture
async def host() -> AsyncIterator[ScannerHost]:
    async with ScannerHost() as host:
        yield host


@pytest.fixture
async def agents(host: ScannerHost) -> AsyncIterator[list[FakeAgent]]:
    agents = [await FakeAgent.connect(host.directory) for _ in range(3)]
    yield agents
    for agent in agents:
        if not agent.hung_up.is_set():
            agent.close()


@pytest.fixture
async def merger(host: ScannerHost, agents: list[FakeAgent]) -> AsyncIterator[FakeMerger]:
    merger = FakeMerger(host.directory, agents)
    await merger.start()
    yield merger
    await merger.stop()


async def test_equal_pages_are_merged_and_accounted(
    agents: list[FakeAgent], merger: FakeMerger
) -> None:
    common, own = random_pages(40, 1), random_pages(5, 2)
    zeros = np.zeros((3, PAGE_SIZE), np.uint8)
    first = await agents[0].open("a", np.concatenate((common, own, zeros)))
    first.absent[-1] = True
    await agents[1].open("b", common.copy())
    report = await agents[0].share(first)
    assert report == {
        "merged": 42,
        "differs": 0,
        "pinned": 0,
        "absent": 1,
        "busy": 0,
        "no_mapping": 0,
        "unsupported": 0,
        "unique": 5,
        "shared": 40,
        "pages": 48,
        "no_headroom": 0,
    }
    assert merger.runs == [("zero", 0, "a", 45, 2), ("a", 0, "b", 0, 40)]
    assert set(merger.domains) == {"default"}


async def test_second_share_finds_nothing_left(agents: list[FakeAgent], merger: FakeMerger) -> None:
    first = await agents[0].open("a", random_pages(10, 1))
    second = await agents[1].open("b", random_pages(10, 1))
    await agents[0].share(first)
    merger.runs.clear()
    report = await agents[1].share(second)
    assert (report["merged"], report["shared"], report["unique"]) == (0, 10, 0)
    assert not merger.runs


async def test_shares_of_what_does_not_change_tell_the_same(
    agents: list[FakeAgent], merger: FakeMerger
) -> None:
    """Also when an arena comes meanwhile that has nothing in it yet, and when it gets something."""
    first = await agents[0].open("a", random_pages(10, 1))
    await agents[0].share(first)
    reports = [await agents[0].share(first) for _ in range(3)]
    assert [report["unique"] for report in reports] == [10, 10, 10]
    second = await agents[1].open("b", random_pages(4, 9))
    second.absent[:] = True
    assert (await agents[1].share(second))["absent"] == 4
    assert (await agents[0].share(first))["unique"] == 10
    second.absent[:] = False
    second.memory[:] = first.memory[:4]
    assert (await agents[1].share(second))["shared"] == 4
    assert (await agents[0].share(first))["unique"] == 6


async def test_share_sees_what_was_written_just_before(
    agents: list[FakeAgent], merger: FakeMerger
) -> None:
    first = await agents[0].open("a", random_pages(10, 1))
    second = await agents[1].open("b", random_pages(10, 2))
    assert (await agents[0].share(first))["unique"] == 10
    second.memory[4:8] = first.memory[2:6]
    report = await agents[0].share(first)
    assert (report["merged"], report["unique"]) == (4, 6)
    assert merger.runs == [("a", 2, "b", 4, 4)]


async def test_newcomer_follows_shared_pages(agents: list[FakeAgent], merger: FakeMerger) -> None:
    arena = await agents[1].open("b", random_pages(10, 1))
    await agents[2].open("c", random_pages(10, 1))
    await agents[1].share(arena)
    merger.runs.clear()
    newcomer = await agents[0].open("a", random_pages(10, 1))
    assert (await agents[0].share(newcomer))["shared"] == 10
    assert merger.runs == [("b", 0, "a", 0, 10)]


async def test_domains_do_not_meet(agents: list[FakeAgent], merger: FakeMerger) -> None:
    first = await agents[0].open("a", random_pages(10, 1), "one")
    second = await agents[1].open("b", random_pages(10, 1), "two")
    assert first.seed != second.seed
    assert (await agents[0].share(first))["unique"] == 10
    assert not agents[1].orders
    assert not merger.runs


async def test_same_domain_has_one_seed(agents: list[FakeAgent]) -> None:
    first = await agents[0].open("a", random_pages(1, 1))
    second = await agents[1].open("b", random_pages(1, 1))
    assert first.seed == second.seed != 0


async def test_one_pass_serves_all_that_wait(agents: list[FakeAgent], merger: FakeMerger) -> None:
    arenas = [await agents[0].open(name, random_pages(10, 1)) for name in "ab"]
    reports = await asyncio.gather(*(agents[0].share(arena) for arena in arenas))
    assert [report["shared"] for report in reports] == [10, 10]
    assert len(agents[0].orders) == 2


async def test_share_during_a_share_gets_a_pass_of_its_own(
    agents: list[FakeAgent], merger: FakeMerger
) -> None:
    first = await agents[0].open("a", random_pages(10, 1))
    second = await agents[1].open("b", random_pages(10, 2))
    merger.hold = asyncio.Event()
    second.memory[0] = first.memory[0]
    early = asyncio.create_task(agents[0].share(first))
    await merger.requested.wait()
    second.memory[1] = first.memory[1]
    late = asyncio.create_task(agents[1].share(second))
    await agents[2].open("c", random_pages(1, 3))
    merger.hold.set()
    assert (await early)["shared"] == 1
    assert (await late)["shared"] == 2


async def test_pinned_pages_are_told_and_tried_again(
    host: ScannerHost, agents: list[FakeAgent], merger: FakeMerger
) -> None:
    first = await agents[0].open("a", random_pages(10, 1))
    second = await agents[1].open("b", random_pages(10, 1))
    second.pinned[3] = True
    report = await agents[1].share(second)
    assert (report["merged"], report["pinned"], report["shared"]) == (9, 1, 9)
    second.pinned[3] = False
    merger.runs.clear()
    await host.service.passes.run_once()
    await host.service.passes.run_once()
    assert merger.runs == [("a", 3, "b", 3, 1)]
    assert first.shared.all()
    assert second.shared.all()


async def test_pages_that_only_look_equal_differ(
    agents: list[FakeAgent], merger: FakeMerger
) -> None:
    """An agent may lie about fingerprints: what counts is the compare."""
    honest = await agents[0].open("a", random_pages(4, 1))
    liar = await agents[1].open("b", random_pages(4, 2))
    agents[1].on_order = lambda order: _claim(agents[1], order, honest.fingerprint)
    report = await agents[1].share(liar)
    assert (report["differs"], report["shared"]) == (4, 0)
    assert not liar.shared.any()


def _claim(agent: FakeAgent, order: Message, fingerprint: Callable[[int], bytes]) -> None:
    packed = b"".join(map(fingerprint, range(4)))
    agent.write_window(packed + bytes([PageState.PRIVATE] * 4))
    agent.done(order)


async def test_arena_that_the_merger_does_not_know_yet_is_busy(
    agents: list[FakeAgent], merger: FakeMerger
) -> None:
    merger.agents.remove(agents[1])
    await agents[0].open("a", random_pages(4, 1))
    unknown = await agents[1].open("b", random_pages(4, 1))
    report = await agents[1].share(unknown)
    assert (report["busy"], report["merged"]) == (4, 0)


async def test_large_arenas_take_several_orders(
    agents: list[FakeAgent], merger: FakeMerger
) -> None:
    count = FINGERPRINT_PAGES_MAX + 10
    sparse = np.zeros((count, PAGE_SIZE), np.uint8)
    sparse[-20:] = random_pages(20, 1)
    first = await agents[0].open("a", sparse)
    first.absent[:-20] = True
    second = await agents[1].open("b", random_pages(20, 1))
    report = await agents[0].share(first)
    assert (report["merged"], report["absent"], report["pages"]) == (20, count - 20, count)
    assert len(agents[0].orders) == 2
    assert second.shared.all()


async def test_merger_away(host: ScannerHost, agents: list[FakeAgent]) -> None:
    first = await agents[0].open("a", random_pages(4, 1))
    await agents[1].open("b", random_pages(4, 1))
    with pytest.raises(RefusedError) as refused:
        await agents[0].share(first)
    assert refused.value.error == errno.ENOTCONN
    assert "the merger" in refused.value.text
    assert "start the merger" in refused.value.text
    await host.service.passes.run_once()
    merger = FakeMerger(host.directory, agents)
    await merger.start()
    assert (await agents[0].share(first))["shared"] == 4
    await merger.stop()


async def test_merger_goes_during_a_share_and_comes_back(
    host: ScannerHost, agents: list[FakeAgent], merger: FakeMerger
) -> None:
    first = await agents[0].open("a", random_pages(4, 1))
    await agents[1].open("b", random_pages(4, 1))
    merger.hold = asyncio.Event()
    share = asyncio.create_task(agents[0].share(first))
    await merger.requested.wait()
    await merger.stop()
    with pytest.raises(RefusedError) as refused:
        await share
    assert refused.value.error == errno.ENOTCONN
    successor = FakeMerger(host.directory, agents)
    await successor.start()
    assert (await agents[0].share(first))["shared"] == 4
    await successor.stop()


async def test_runs_that_the_merger_refuses_cost_no_other_arena(
    agents: list[FakeAgent], merger: FakeMerger
) -> None:
    first = await agents[0].open("a", random_pages(6, 1))
    other = await agents[1].open("b", random_pages(6, 1))
    refused = await agents[2].open("c", random_pages(4, 1))
    merger.refused = "c"
    report = await agents[2].share(refused)
    assert (report["busy"], report["merged"]) == (4, 0)
    assert first.shared.all()
    assert other.shared.all()
    merger.refused = ""
    assert (await agents[2].share(refused))["merged"] == 4


async def test_silent_merger_counts_as_away() -> None:
    async with ScannerHost(merger_seconds=0.2) as host:
        agent = await FakeAgent.connect(host.directory)
        merger = FakeMerger(host.directory, [agent])
        await merger.start()
        arena = await agent.open("a", np.concatenate([random_pages(4, 1)] * 2))
        merger.hold = asyncio.Event()
        with pytest.raises(RefusedError, match="no progress") as refused:
            await agent.share(arena)
        assert refused.value.error == errno.ENOTCONN
        merger.hold = None
        assert (await agent.share(arena))["shared"] == 8
        agent.close()
        await merger.stop()


async def test_closing_while_sharing(agents: list[FakeAgent], merger: FakeMerger) -> None:
    first = await agents[0].open("a", random_pages(4, 1))
    await agents[1].open("b", random_pages(4, 1))
    merger.hold = asyncio.Event()
    share = asyncio.create_task(agents[0].share(first))
    await merger.requested.wait()
    agents[0].close_arena(first)
    await agents[0].open("c", random_pages(1, 3))
    merger.hold.set()
    with pytest.raises(RefusedError, match="closed meanwhile") as refused:
        await share
    assert refused.value.error == errno.ENOENT
