"""kill -9 at every step of clone, migrate and evict: every byte stays, the books are exact, and
nothing is left over.

Each failpoint once kills the daemon that comes by it. Each other part of the cluster is killed
while a daemon stands still at a failpoint, another one from test to test.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from application import ApplicationError
from helpers.world import World, world

from samepage.daemon.failpoints import FAILPOINTS

pytestmark = [
    pytest.mark.needs("root", "away", "remap", "netns"),
    pytest.mark.slow,
    pytest.mark.timeout(240),
]

PAGES = 512
COMMON = 128  # of them are on the destination already
CLONES = ("clone", "lazy clone", "migrate")
EVICTING = [name for name in FAILPOINTS if name.split(".")[0] in ("evict", "return", "spill")]
HOLDING = ["leases.granted", "pages.held", "pages.released"]
MIGRATING = [name for name in FAILPOINTS if name.startswith("migrate.")] + [
    "snapshot.looked",
    "snapshot.held",
    "snapshot.frozen",
    "snapshot.leaving",
    "snapshot.left",
]
CLONING = [name for name in FAILPOINTS if name not in {*EVICTING, *HOLDING, *MIGRATING}]
#: Who is killed, what is under way, and the failpoint at which a daemon stands still then.
KILLS = [
    ("host-1/merger", "clone", "clone.fetched"),
    ("host-1/merger", "lazy clone", "clone.told"),
    ("host-1/merger", "migrate", "migrate.frozen"),
    ("host-2/merger", "clone", "snapshot.offered"),
    ("host-2/merger", "migrate", "snapshot.leaving"),
    ("host-2/merger", "lazy clone", "snapshot.ended"),
    ("host-1/scanner", "clone", "snapshot.read"),
    ("host-2/scanner", "clone", "clone.opened"),
    ("host-2/scanner", "migrate", "migrate.round"),
    ("host-1/arenas", "clone", "pages.found"),
    ("host-2/arenas", "migrate", "migrate.left"),
    ("index", "clone", "clone.snapshot"),
    ("index", "migrate", "migrate.noted"),
    ("redis", "clone", "clone.asked"),
    ("redis", "migrate", "snapshot.frozen"),
]
EVICT_KILLS = [
    ("host-1/merger", "evict.read"),
    ("host-1/scanner", "evict.held"),
    ("host-1/arenas", "evict.safe"),
    ("index", "evict.read"),
    ("redis", "evict.held"),
    ("host-2/merger", "evict.gone"),
    ("host-1/merger", "return.supplied"),
    ("host-2/merger", "return.supplied"),
    ("index", "return.filled"),
    ("redis", "return.supplied"),
    ("host-1/scanner", "return.filled"),
]


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    settings = {"min_holders": 1, "lost_seconds": 600, "hold_lease_seconds": 20}
    with world(tmp_path_factory.mktemp("kills"), 2, **settings) as cluster:
        yield cluster
        cluster.check_gone()


@pytest.fixture
def cluster(shared_cluster: World) -> Iterator[World]:
    """The cluster; when a test ends nothing of its arenas may be wrong."""
    shared_cluster.reset()
    shared_cluster.settle()
    yield shared_cluster
    shared_cluster.check_bytes()
    shared_cluster.check_books()
    shared_cluster.close_all()
    assert not shared_cluster.laid(), "a failpoint was laid, and nobody came by"


def test_every_failpoint_is_here() -> None:
    assert {*CLONING, *MIGRATING, *EVICTING, *HOLDING} == set(FAILPOINTS)
    assert len(FAILPOINTS) >= 20


def clone_and_write(cluster: World, call: str, lay: str, action: str, victim: str = "") -> None:
    """Clone from host 1 to host 2, which has a part already, and something happens meanwhile."""
    source = cluster.create(1, PAGES)
    cluster.write(source, PAGES - 1, b"its own")
    cluster.share(cluster.create(2, COMMON, source.seed))
    cluster.lay(lay, action)
    _, done = cluster.start_clone(call, source, 2)
    cluster.await_acted(lay)
    if victim:
        cluster.kill(victim)
    copy = done()
    cluster.write(copy, 3, b"the copy's own")
    if call != "migrate":
        cluster.write(source, 5, b"the source's own")


@pytest.mark.parametrize("name", CLONING)
def test_killed_in_a_clone(cluster: World, name: str) -> None:
    clone_and_write(cluster, "clone", name, "kill")


@pytest.mark.parametrize("name", MIGRATING)
def test_killed_in_a_migration(cluster: World, name: str) -> None:
    clone_and_write(cluster, "migrate", name, "kill")


@pytest.mark.parametrize(("victim", "call", "at"), KILLS)
def test_others_killed_in_a_clone(cluster: World, victim: str, call: str, at: str) -> None:
    clone_and_write(cluster, call, at, "sleep 0.2", victim)


@pytest.mark.parametrize("name", EVICTING)
def test_killed_in_an_eviction(cluster: World, name: str) -> None:
    held = cluster.create(1, PAGES)
    cluster.lay(name, "kill")
    cluster.evict(held)
    cluster.write(held, 7, b"on touch")
    cluster.fetch(held)
    assert cluster.acted(name)


def held_by_another(cluster: World) -> None:
    """An arena of host 1 whose pages host 2 has too, as the index knows."""
    there = cluster.create(2, PAGES)
    cluster.share(there)
    cluster.create(1, PAGES, there.seed)
    cluster.await_published(2, PAGES)


@pytest.mark.parametrize(("victim", "at"), EVICT_KILLS)
def test_others_killed_in_an_eviction(cluster: World, victim: str, at: str) -> None:
    held_by_another(cluster)
    held = cluster.arenas[-1]
    returning = at.startswith("return.")
    if returning:
        cluster.evict(held)
    cluster.lay(at, "sleep 0.2")
    finish = cluster.start("fetch" if returning else "evict", 1, held.name)
    cluster.await_acted(at)
    cluster.kill(victim)
    try:
        finish()
    except ApplicationError as error:
        cluster.may_pass(error)
    cluster.write(held, 7, b"on touch")
    cluster.fetch(held)


@pytest.mark.parametrize("name", HOLDING)
def test_killed_in_a_hold(cluster: World, name: str) -> None:
    held_by_another(cluster)
    held = cluster.arenas[-1]
    cluster.lay(name, "kill")

    def came_by() -> bool:
        # What the index does not know yet to be held by the other host is spilled.
        cluster.evict(held)
        cluster.fetch(held)
        return cluster.acted(name)

    cluster.wait(came_by, f"nobody came by {name}")


@pytest.mark.parametrize(
    ("call", "at"),
    [("clone", "clone.snapshot"), ("lazy clone", "snapshot.held"), ("migrate", "clone.fetched")],
)
def test_applications_killed_in_a_clone(cluster: World, call: str, at: str) -> None:
    source = cluster.create(1, PAGES)
    cluster.lay(at, "sleep 0.2")
    name, _ = cluster.start_clone(call, source, 2)
    cluster.await_acted(at)
    cluster.kill_application(2)
    cluster.wait(lambda: name not in cluster.names(2), "the dead application's clone stays")
    cluster.check_owner(source)
    cluster.write(source, 9, b"written afterwards")


@pytest.mark.parametrize("call", CLONES)
def test_source_application_killed_in_a_clone(cluster: World, call: str) -> None:
    source = cluster.create(1, PAGES)
    cluster.lay("clone.fetched", "sleep 0.2")
    cluster.start_clone(call, source, 2)
    cluster.await_acted("clone.fetched")
    cluster.kill_application(1)
    cluster.copy_or_nothing(2, source)
