"""A source, a merger that clones from it, and an agent that asks for that."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fakes.cloning_agent import CloningAgent
from fakes.fake_source import FakeSource, SourceArena
from helpers.cloning import PAGES, ZEROS, CloningHost, cloning_host, pages
from helpers.merger_host import DOMAIN, SECRET, store_directory

from samepage.daemon import secrets
from samepage_merger.cluster.digests import Digester


@pytest.fixture
async def source() -> AsyncIterator[FakeSource]:
    domain_id = secrets.domain_id(SECRET, DOMAIN)
    there = FakeSource(Digester(secrets.digest_key(SECRET, domain_id)))
    data = pages(PAGES)
    data[50 : 50 + ZEROS] = 0
    there.arenas["there"] = SourceArena(data)
    await there.start()
    yield there
    await there.stop()


@pytest.fixture
async def host(tmp_path: Path, source: FakeSource) -> AsyncIterator[CloningHost]:
    with store_directory() as store:
        async with cloning_host(tmp_path, store, source) as here:
            yield here


@pytest.fixture
async def agent(host: CloningHost) -> AsyncIterator[CloningAgent]:
    made = CloningAgent(host.path)
    await made.connect()
    yield made
    await made.die()
