"""The merger's accounts over fake agents: exact sums while memory is merged, written, lost."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
from fakes.fake_merging_agent import FakeMergingAgent, random_pages
from helpers.merger_host import MergerHost, store_directory
from helpers.waiting import until

from samepage.daemon.wire import PAGE_SIZE
from samepage.reports import ACCOUNT_FIELDS, Account, HostAccount, total


@pytest.fixture
def store() -> Iterator[Path]:
    with store_directory() as path:
        yield path


@pytest.fixture
async def host(tmp_path: Path, store: Path) -> AsyncIterator[MergerHost]:
    host = MergerHost(tmp_path, store, timeout=2.0)
    yield host
    host.stop()
    gc.collect()


@pytest.fixture
async def agents(host: MergerHost) -> AsyncIterator[list[FakeMergingAgent]]:
    agents = [FakeMergingAgent(host.path) for _ in range(3)]
    for agent in agents:
        await agent.connect()
    yield agents
    for agent in agents:
        await agent.die()


def numbers(account: Account) -> dict[str, int]:
    return {name: getattr(account, name) for name in ACCOUNT_FIELDS}


def assert_adds_up(account: HostAccount) -> None:
    """Every whole is the sum of its parts, and every page and byte of the store is somebody's."""
    assert numbers(account) == total(account.arenas) == total(account.processes)
    assert numbers(account) == total(account.domains)
    for domain in account.domains:
        arenas = [arena for arena in account.arenas if arena.domain == domain.name]
        assert numbers(domain) == total(arenas) and domain.arenas == len(arenas)
        assert domain.store_bytes == domain.proportional_bytes + domain.unattributed_bytes
    assert account.store_bytes == sum(domain.store_bytes for domain in account.domains)
    for part in (account, *account.arenas, *account.processes, *account.domains):
        assert part.pages == (
            part.private_pages + part.shared_pages + part.absent_pages + part.unknown_pages
        )
        assert part.saved_bytes == part.shared_pages * PAGE_SIZE - part.proportional_bytes


async def test_a_host_without_arenas(host: MergerHost) -> None:
    account = await host.accountant.host()
    assert (account.node, numbers(account)) == ("host-a", dict.fromkeys(ACCOUNT_FIELDS, 0))
    assert not (account.arenas or account.processes or account.domains)


async def test_three_sharers(host: MergerHost, agents: list[FakeMergingAgent]) -> None:
    data = random_pages(1, 1000)
    arenas = [await agent.open(f"arena-{n}", data) for n, agent in enumerate(agents)]
    arenas[2].absent[900:] = True
    await host.merge_all(*arenas)
    account = await host.accountant.host()
    assert_adds_up(account)
    assert account.unattributed_bytes == 0 and account.store_bytes == 1000 * PAGE_SIZE
    assert account.shared_pages == 2900
    assert account.saved_bytes == 1900 * PAGE_SIZE
    third = account.arenas[2]
    assert (third.name, third.pages) == ("arena-2", 1000)
    assert (third.shared_pages, third.private_pages, third.absent_pages) == (900, 0, 100)
    assert third.proportional_bytes == pytest.approx(900 * PAGE_SIZE / 3, abs=3)
    assert account.processes[0].arenas == 3, "all fakes are of this process"


async def test_writing_moves_pages_from_shared_to_private(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    data = random_pages(1, 300)
    arenas = [await agent.open(f"arena-{n}", data) for n, agent in enumerate(agents)]
    await host.merge_all(*arenas)
    agents[0].write(arenas[0], 10, b"mine", count=50)
    await agents[0].flushed()
    account = await host.accountant.host()
    assert_adds_up(account)
    assert (account.arenas[0].private_pages, account.arenas[0].shared_pages) == (50, 250)
    assert account.saved_bytes == (850 - 300) * PAGE_SIZE
    assert account.unattributed_bytes == 0


async def test_domains_are_accounted_apart(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    data = random_pages(1, 100)
    ours = [await agent.open("one", data, f"team-{n % 2}") for n, agent in enumerate(agents[:2])]
    more = [await agent.open("two", data, f"team-{n % 2}") for n, agent in enumerate(agents[:2])]
    for number in range(2):
        await host.merge([ours[number], more[number - 1]], [(0, 1, 0, 0, 100)], f"team-{number}")
    account = await host.accountant.host()
    assert_adds_up(account)
    assert [domain.name for domain in account.domains] == ["team-0", "team-1"]


async def test_an_arena_that_shares_with_itself(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    page = random_pages(1, 1)
    arena = await agents[0].open("repeats", np.repeat(page, 7, axis=0))
    await host.merge([arena], [(0, 0, 0, n, 1) for n in range(1, 7)])
    account = await host.accountant.host()
    assert_adds_up(account)
    assert account.arenas[0].proportional_bytes == PAGE_SIZE
    assert account.saved_bytes == 6 * PAGE_SIZE


async def test_a_process_that_does_not_answer_is_not_guessed_at(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    data = random_pages(1, 100)
    arenas = [await agent.open(f"arena-{n}", data) for n, agent in enumerate(agents)]
    await host.merge(arenas[:2], [(0, 1, 0, 0, 60)])
    agents[1].obey.clear()
    account = await host.accountant.host()
    assert_adds_up(account)
    assert [arena.unknown_pages for arena in account.arenas] == [0, 40, 0]
    assert [arena.shared_pages for arena in account.arenas] == [60, 60, 0]
    agents[1].obey.set()


async def test_an_agent_that_exaggerates_is_not_believed(
    host: MergerHost, agents: list[FakeMergingAgent], monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = await agents[0].open("liar", random_pages(1, 10))
    monkeypatch.setattr(arena, "absent", np.ones(10**6, np.bool_))
    account = await host.accountant.host()
    assert_adds_up(account)
    assert (account.arenas[0].pages, account.arenas[0].absent_pages) == (10, 10)


async def test_an_arena_in_limbo_keeps_its_share(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    data = random_pages(1, 100)
    arenas = [await agent.open(f"arena-{n}", data) for n, agent in enumerate(agents)]
    await host.merge_all(*arenas)
    await agents[0].disconnect()
    await until(lambda: len(host.agents) == 2)
    account = await host.accountant.host()
    assert_adds_up(account)
    lost = account.arenas[0]
    assert (lost.pid, lost.agent, lost.shared_pages) == (0, agents[0].agent.hex(), 100)
    assert account.unattributed_bytes == 0
    assert len(account.processes) == 2
