"""Networks that fail: hosts that are kept apart in the middle of it, slow and lossy links, an index
or a Redis that does not answer. Bytes stay, savings come back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from application import ApplicationError
from helpers import links
from helpers.world import World, world

pytestmark = [
    pytest.mark.needs("root", "away", "remap", "netns"),
    pytest.mark.slow,
    pytest.mark.timeout(240),
]

PAGES = 1024
CLONES = ("clone", "lazy clone", "migrate")
CUT_SECONDS = 1.0
IN_THE_MIDDLE = {
    "clone": ["clone.snapshot", "clone.fetched"],
    "lazy clone": ["clone.away", "clone.told"],
    "migrate": ["migrate.round", "migrate.noted", "migrate.left"],
}


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    settings = {"min_holders": 1, "lost_seconds": 600, "hold_lease_seconds": 20}
    with world(tmp_path_factory.mktemp("network"), 2, **settings) as cluster:
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


def evicted_to_host_2(cluster: World) -> None:
    """The last arena is one of host 1, whose pages host 2 holds and nobody else."""
    there = cluster.create(2, PAGES)
    cluster.share(there)
    held = cluster.create(1, PAGES, there.seed)
    cluster.await_published(2, PAGES)

    def evicted() -> bool:
        """Who was away in the test before is not asked again at once; then pages are spilled."""
        if cluster.evict(held)["held_elsewhere"] == PAGES:
            return True
        cluster.fetch(held)
        return False

    cluster.wait(evicted, "host-2 does not hold the pages")


@contextlib.contextmanager
def parted(cluster: World, how: str) -> Iterator[None]:
    """The hosts from each other, one of them from the index, or the index from its Redis."""
    match how:
        case "hosts":
            with links.apart(cluster.link(1), cluster.link(2)):
                yield
        case "host and index":
            with links.apart(cluster.link(2), cluster.link("index")):
                yield
        case "all":
            with links.cut(cluster.link(1)):
                yield
        case "index and redis":
            with cluster.stopped("redis"):
                yield


PARTS = ("hosts", "host and index", "index and redis")


@pytest.mark.parametrize("how", PARTS)
@pytest.mark.parametrize(("call", "at"), [(c, at) for c in CLONES for at in IN_THE_MIDDLE[c]])
def test_parted_in_a_clone(cluster: World, call: str, at: str, how: str) -> None:
    source = cluster.create(1, PAGES)
    cluster.lay(at, "sleep 0.1")
    _, done = cluster.start_clone(call, source, 2)
    cluster.await_acted(at)
    with parted(cluster, how):
        cluster.pass_time(CUT_SECONDS)
    copy = done()
    cluster.write(copy, 3, b"the copy's own")


@pytest.mark.parametrize("how", ["hosts", "all"])
def test_parted_while_evicted_pages_return(cluster: World, how: str) -> None:
    evicted_to_host_2(cluster)
    held = cluster.arenas[-1]
    with parted(cluster, how):
        finish = cluster.start("touch", 1, held.name, list(range(0, PAGES, 7)), 4)
        cluster.pass_time(CUT_SECONDS)
        assert cluster.status(1).away_pages == PAGES
    assert finish() == [], "a page that was away was seen as zeros"
    cluster.write(held, 3, b"on touch")
    cluster.fetch(held)


@pytest.mark.parametrize("how", PARTS)
def test_parted_while_pages_leave(cluster: World, how: str) -> None:
    there = cluster.create(2, PAGES)
    cluster.share(there)
    held = cluster.create(1, PAGES, there.seed)
    cluster.await_published(2, PAGES)
    with parted(cluster, how):
        report = cluster.evict(held)
    assert report["held_elsewhere"] + report["spilled"] == PAGES
    cluster.write(held, 3, b"on touch")
    cluster.fetch(held)


@pytest.mark.parametrize("how", PARTS)
def test_everything_else_goes_on_while_parted(cluster: World, how: str) -> None:
    arenas = [cluster.create(host, 64, 77) for host in (1, 1, 2, 2)]
    with parted(cluster, how):
        for held in arenas:
            cluster.share(held)
            cluster.write(held, 9, b"its own")
        cluster.check_bytes()
        cluster.check_books()


@pytest.mark.parametrize(
    "bad",
    [{"delay_ms": 50}, {"loss": 0.05}, {"delay_ms": 5, "reorder": 0.25}],
    ids=["100 ms there and back", "loss of 5 %", "reordering"],
)
def test_bad_links(cluster: World, bad: dict[str, Any]) -> None:
    sources = [cluster.create(1, 256) for _ in CLONES]
    evicted_to_host_2(cluster)
    held = cluster.arenas[-1]
    network = cluster.network
    with links.impaired(network.bridge, cluster.link(2), cluster.namespace(2), **bad):
        for call, source in zip(CLONES, sources, strict=True):
            cluster.clone(call, source, 2)
        cluster.fetch(held)
        cluster.check_bytes()


def test_clone_of_what_is_not_there(cluster: World) -> None:
    source = cluster.create(1, 16)
    for name, text in (("host-9/x", "no host 'host-9'"), ("host-1/none", "'none'")):
        with pytest.raises(ApplicationError, match=text) as raised:
            cluster.application(2).call("clone", "clone_arena", name, "copy", 10)
        assert raised.value.kind == "NotFoundError"
    with pytest.raises(ApplicationError) as raised:
        cluster.application(2).call(
            "clone", "clone_arena", source.source, "copy", 10, {"domain": "another"}
        )
    assert raised.value.kind == "NotFoundError"
    assert cluster.names(2) == []


@pytest.mark.parametrize("call", CLONES)
def test_clone_of_an_arena_that_is_being_closed(cluster: World, call: str) -> None:
    source = cluster.create(1, PAGES)
    at = "snapshot.read" if call == "clone" else "snapshot.looked"
    cluster.lay(at, "sleep 0.3")
    cluster.start_clone(call, source, 2)
    cluster.await_acted(at)
    cluster.close(source)
    cluster.copy_or_nothing(2, source)


def test_clone_to_a_host_without_memory(cluster: World) -> None:
    source = cluster.create(1, PAGES)
    cluster.set_policy(2, store_limit_bytes=1 << 20)
    try:
        with pytest.raises(ApplicationError, match=r"room|memory"):
            cluster.application(2).call("clone", "clone_arena", source.source, "copy", 20)
        assert cluster.names(2) == []
    finally:
        cluster.set_policy(2, store_limit_bytes=0)
    cluster.clone("clone", source, 2)


@pytest.mark.parametrize("here", [False, True], ids=["all to be fetched", "all of it here"])
def test_clone_beyond_the_headroom(cluster: World, here: bool) -> None:
    source = cluster.create(1, PAGES)
    if here:
        cluster.share(cluster.create(2, PAGES, source.seed))
    cluster.set_policy(2, memory_ceiling_bytes=1 << 16)
    try:
        with pytest.raises(ApplicationError, match="memory") as raised:
            cluster.application(2).call("clone", "clone_arena", source.source, "copy", 20)
        assert raised.value.kind == "OutOfMemoryError"
        assert "copy" not in cluster.names(2)
    finally:
        cluster.set_policy(2, memory_ceiling_bytes=0)
    cluster.clone("clone", source, 2)


def test_evict_with_a_full_disk(cluster: World) -> None:
    held = cluster.create(1, PAGES)
    cluster.set_policy(1, spill_limit_bytes=1 << 20)
    try:
        report = cluster.evict(held)
        assert report["no_room"] > PAGES // 2
        assert report["no_room"] + report["spilled"] == PAGES
        cluster.check_bytes()
    finally:
        cluster.set_policy(1, spill_limit_bytes=8 << 30)
