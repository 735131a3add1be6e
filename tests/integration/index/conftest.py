"""Servers and index processes, ended with the test."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import needs
import pytest
from helpers.index_harness import Books, IndexProcess, RedisServer


@pytest.fixture(scope="module", params=["valkey", "redis"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisServer]:
    """A Valkey, then a Redis: every test that uses it runs on both."""
    lacking = needs.missing("redis") if request.param == "redis" else None
    if lacking is not None:
        pytest.skip(lacking)
    started = RedisServer(request.param, tmp_path_factory.mktemp("redis"))
    yield started
    started.kill()


@pytest.fixture
async def books(server: RedisServer) -> AsyncIterator[Books]:
    """An empty index on `server`, with long leases."""
    async with Books(server.url) as made:
        await made.flush()
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
