"""kill -9 of the merger at each step of evicting and of bringing back: no byte is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from fakes.fake_merging_agent import FakeMergingAgent, RefusedError, random_pages
from helpers.merger_host import store_directory
from helpers.waiting import until

from samepage.daemon.failpoints import FAILPOINTS, VARIABLE

PAGES = 700
STEPS = sorted(name for name in FAILPOINTS if name.startswith(("evict.", "spill.", "return.")))

pytestmark = [pytest.mark.needs("root"), pytest.mark.timeout(120)]


class Merger:
    """A merger's process, that can be started again."""

    def __init__(self, directory: Path, store: Path) -> None:
        self.directory = directory
        self.failpoints = directory / "failpoints"
        self.failpoints.mkdir()
        (directory / "secret").write_text("the secret of a test's cluster")
        settings = {
            "NODE": "a",
            "DIR": str(directory),
            "STORE_DIR": str(store),
            "SPILL_DIR": str(directory / "spill"),
            "SECRET_FILE": str(directory / "secret"),
            "READY_FILE": str(directory / "ready"),
            "LOST_SECONDS": "0",
        }
        self._environment = {
            **os.environ,
            VARIABLE: str(self.failpoints),
            **{f"SAMEPAGE_MERGER_{name}": value for name, value in settings.items()},
        }

    async def start(self) -> None:
        (self.directory / "ready").unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "samepage_merger"], env=self._environment
        )
        await until(lambda: (self.directory / "ready").exists())

    async def ended(self) -> None:
        await until(lambda: self.process.poll() is not None)

    async def stop(self) -> None:
        self.process.terminate()
        await self.ended()


@pytest.fixture
def store() -> Iterator[Path]:
    with store_directory() as path:
        yield path


@pytest.fixture
async def merger(tmp_path: Path, store: Path) -> AsyncIterator[Merger]:
    merger = Merger(tmp_path, store)
    await merger.start()
    yield merger
    if merger.process.poll() is None:
        await merger.stop()


@pytest.mark.parametrize("step", STEPS)
async def test_a_merger_killed_at_any_step_loses_nothing(merger: Merger, step: str) -> None:
    data = random_pages(7, PAGES)
    agent = FakeMergingAgent(merger.directory / "merger.sock")
    await agent.connect()
    arena = await agent.open("arena", data)
    if step.startswith("return."):
        assert await agent.evict(arena) == (0, PAGES, 0, 0)
    (merger.failpoints / step).write_text("kill")
    if step.startswith("return."):
        agent.fetch(arena, 0, PAGES)
    else:
        with pytest.raises((ConnectionError, RefusedError)):
            await agent.evict(arena)
    await merger.ended()
    assert not (merger.failpoints / step).exists()
    await agent.ended.wait()

    await merger.start()
    await agent.disconnect()
    await agent.connect()
    await agent.announce(arena)
    away = len(arena.away)
    assert await agent.evict(arena) == (0, PAGES - away, away, 0)
    assert len(arena.away) == PAGES
    agent.fetch(arena, 0, PAGES)
    await until(lambda: not arena.away)
    assert not arena.poisoned.any()
    assert arena.view() == data.tobytes()
    assert (await agent.account(arena))[0] == 0
    await agent.die()
