"""An arena gets so many mappings and no more, and the longest runs get them."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
from application import PAGE, Application, content
from fakes.fake_merging_agent import FakeArena, FakeMergingAgent, random_pages
from helpers.merger_host import MergerHost, store_directory
from helpers.up import Up, running, samepage

from samepage.daemon.wire import Outcome
from samepage.v1 import merger_pb2
from samepage_merger.config import Config
from samepage_merger.mappings import default_budget
from samepage_merger.orders import DISPLACED

BUDGET = 41
PAGES = 400
LONG = [(page, 10) for page in range(200, 400, 20)]
SINGLE = [(page, 1) for page in range(1, 200, 2)]


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[MergerHost]:
    with store_directory() as store:
        host = MergerHost(tmp_path, store, config=Config(node="test", vma_budget=BUDGET))
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


async def merge(
    host: MergerHost,
    arenas: list[FakeArena],
    runs: list[tuple[int, int]],
    follower: int = 1,
) -> tuple[int, int]:
    """Merge runs (page, count) of the first arena with another's; return pages that the follower
    maps now, and pages refused."""
    named = [(0, follower, page, page, count) for page, count in runs]
    outcomes = await host.merge(arenas, named)
    return int(outcomes[follower, Outcome.MERGED]), int(outcomes[follower, Outcome.NO_MAPPING])


def mappings(arena: FakeArena) -> int:
    """What the kernel would make of the slots that an arena maps."""
    here, following = arena.slots[:-1], arena.slots[1:]
    return 1 + int(np.count_nonzero(following != here + (here != 0)))


def shared(arena: FakeArena, runs: list[tuple[int, int]]) -> int:
    return sum(int(arena.slots[page : page + count].all()) for page, count in runs)


async def open_all(agents: list[FakeMergingAgent]) -> list[FakeArena]:
    data = random_pages(1, PAGES)
    return [await agent.open(f"arena-{n}", data) for n, agent in enumerate(agents)]


async def test_the_longest_runs_get_the_mappings(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    arenas = await open_all(agents)
    merged, refused = await merge(host, arenas, SINGLE + LONG)
    assert shared(arenas[1], LONG) == len(LONG)
    # a run takes two mappings; all together leave the first
    assert shared(arenas[1], SINGLE) == (BUDGET - 1) // 2 - len(LONG)
    assert merged + refused == 100 + len(SINGLE)
    assert all(mappings(arena) <= BUDGET for arena in arenas)
    assert all(arena.view() == arenas[2].view() for arena in arenas)
    host.assert_exact(*agents)


async def test_longer_runs_that_come_later_take_the_place_of_short_ones(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    arenas = await open_all(agents)
    merged, refused = await merge(host, arenas, SINGLE)
    assert (merged, refused) == (20, len(SINGLE) - 20)
    merged, refused = await merge(host, arenas, LONG)
    assert (merged, refused) == (100, 0)
    assert host.engine.outcomes[DISPLACED] == 20  # ten in each
    assert shared(arenas[1], LONG) == len(LONG) and shared(arenas[1], SINGLE) == 10
    assert all(mappings(arena) <= BUDGET for arena in arenas)
    # what had to go does not come back in place of what is better, nor of its like
    before = arenas[1].slots.tolist()
    assert await merge(host, arenas, SINGLE) == (0, 90)
    assert await merge(host, arenas, [(page, 2) for page in range(2, 200, 40)]) == (0, 10)
    assert arenas[1].slots.tolist() == before
    host.assert_exact(*agents)


async def test_nothing_goes_where_the_other_side_has_no_room(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    arenas = await open_all(agents)
    await merge(host, arenas, [(page, 10) for page in range(0, 400, 20)])
    other = random_pages(2, PAGES)
    other[210:220] = random_pages(1, PAGES)[210:220]
    full = await agents[2].open("full", other)
    follower = await agents[2].open("follower", other)
    await merge(host, [full, follower], SINGLE)
    before = full.slots.tolist()
    outcomes = await host.merge([arenas[0], full], [(0, 1, 210, 210, 10)])
    assert outcomes[1, Outcome.NO_MAPPING] == 10
    assert full.slots.tolist() == before
    host.assert_exact(*agents)


async def test_runs_that_join_take_one_mapping(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    """Scattered in one arena, side by side in the other: only the first one is full."""
    data = random_pages(1, 100)
    order = np.random.default_rng(4).permutation(100)
    leader = await agents[0].open("ordered", data)
    runs = [(0, 1, int(page), at, 1) for at, page in enumerate(order)]
    scattered = await agents[1].open("mixed-1", data[order])
    outcomes = await host.merge([leader, scattered], runs)
    assert outcomes[1, Outcome.MERGED] + outcomes[1, Outcome.NO_MAPPING] == 100
    assert BUDGET - 2 <= mappings(scattered) <= BUDGET
    host.assert_exact(*agents)


async def test_the_budget_is_a_policy(host: MergerHost, agents: list[FakeMergingAgent]) -> None:
    arenas = await open_all(agents)
    assert await merge(host, arenas, SINGLE) == (20, 80)
    host.policies.change(merger_pb2.MergerPolicy(vma_budget=61))
    assert await merge(host, arenas, SINGLE) == (10, 70)
    host.policies.change(merger_pb2.MergerPolicy(vma_budget=0))
    assert await merge(host, arenas, SINGLE) == (70, 0)
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    assert default_budget() == limit // 4


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with running(tmp_path_factory.mktemp("cluster")) as up:
        yield up


@pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap")
def test_what_the_kernel_counts(cluster: Up) -> None:
    """Every second page is equal, and a long run; /proc tells of how many mappings."""
    pages, budget = 600, 101
    changed = samepage("policy", f"vma_budget={budget}", "--dir", cluster.directory)
    assert changed.returncode == 0, changed.stderr
    with Application(cluster.host()) as one, Application(cluster.host()) as two:
        for number, application in enumerate((one, two)):
            application.call("create", f"vma-{number}", pages)
            application.call("fill", f"vma-{number}", number)
            for page in range(0, 400, 2):
                application.call("fill", f"vma-{number}", 1000 + page, page, 1)
        report = one.call("share", "vma-0")
        assert (report["shared"], report["no_mapping"]) == (50, 150)
        for number, application in enumerate((one, two)):
            assert len(application.call("mappings", f"vma-{number}")) <= budget
            application.call("fill", f"vma-{number}", 7, 450, 100)
        report = one.call("share", "vma-0")
        assert (report["shared"], report["no_mapping"]) == (149, 151)
        assert one.call("pagemap", "vma-0")[450:550] == [5] * 100
        for number, application in enumerate((one, two)):
            assert len(application.call("mappings", f"vma-{number}")) <= budget
        expected = bytearray(content(0, pages))
        for page in range(0, 400, 2):
            expected[page * PAGE : (page + 1) * PAGE] = content(1000 + page, 1)
        expected[450 * PAGE : 550 * PAGE] = content(7, 100)
        assert one.call("digest", "vma-0") == hashlib.sha256(expected).hexdigest()
        assert samepage("policy", "vma_budget=0", "--dir", cluster.directory).returncode == 0
        assert one.call("share", "vma-0")["shared"] == 300


@pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap")
def test_adjacent_runs_become_one_mapping(cluster: Up) -> None:
    """Shared at different times, or written and shared again."""
    with Application(cluster.host()) as one, Application(cluster.host()) as two:
        for number, application in enumerate((one, two)):
            application.call("create", f"joined-{number}", 300)
        for page in range(0, 300, 100):
            for number, application in enumerate((one, two)):
                application.call("fill", f"joined-{number}", page, page, 100)
            assert one.call("share", "joined-0")["shared"] == page + 100
            [shared, *_] = one.call("mappings", "joined-0")
            assert shared[:2] == [0, page + 100]
        for page in (0, 57, 299):
            data = two.call("read", "joined-1", page * PAGE, PAGE)
            one.call("write", "joined-0", page * PAGE, data)
        assert one.call("share", "joined-0")["shared"] == 300
        assert len(one.call("mappings", "joined-0")) == 1
        assert one.call("mappings", "joined-0") == two.call("mappings", "joined-1")
