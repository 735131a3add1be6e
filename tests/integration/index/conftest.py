"""Servers and index processes, ended with the test."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import needs
import pytest
from helpers.index_harness import Books, IndexProcess, RedisServer
from helpers.redis_cluster import RedisCluster

Server = RedisServer | RedisCluster


@pytest.fixture(scope="module", params=["valkey", "redis", "cluster"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A Valkey, a Redis, a Redis Cluster: every test that uses it runs on each."""
    lacking = None if request.param == "valkey" else needs.missing("redis")
    if lacking is not None:
        pytest.skip(lacking)
    folder = tmp_path_factory.mktemp("redis")
    started: Server
    if request.param == "cluster":
        started = RedisCluster(folder)
    else:
        started = RedisServer(request.param, folder)
    yield started
    started.kill()


@pytest.fixture
async def books(server: Server) -> AsyncIterator[Books]:
    """An empty index on `server`, with long leases."""
    server.flush()
    async with Books(server.url) as made:
        yield made


StartIndex = Callable[..., IndexProcess]


@pytest.fixture
def start_index(tmp_path: Path) -> Iterator[StartIndex]:
    """Starts index processes."""
    started: list[IndexProcess] = []
    numbers = itertools.count()

    def start(**settings: object) -> IndexProcess:
        folder = tmp_path / f"index-{next(numbers)}"
        folder.mkdir()
        started.append(IndexProcess(folder, tmp_path, **settings))
        return started[-1]

    yield start
    for process in started:
        process.kill()
