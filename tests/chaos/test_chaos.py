"""Anything at any time: hosts and applications clone, migrate, evict, write and share, while
daemons and applications are killed, hosts are kept apart and links lose packets.

Everything is drawn from a seed, which is printed. All bytes are compared all along, and the books
against /proc; at the end every arena is closed, and nothing may be left. A short form runs with
every test; `make chaos` takes as long as told (SAMEPAGE_CHAOS_SECONDS, SAMEPAGE_CHAOS_SEED).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import links
from helpers.world import Held, World, world

from samepage.daemon.failpoints import FAILPOINTS

SECONDS = float(os.environ.get("SAMEPAGE_CHAOS_SECONDS", "12"))
HOSTS = 3
PAGES_MAX = 400
ARENAS_MAX = 9
SEEDS = (1, 2)  # of what arenas have in common
TROUBLE_SECONDS = 1.0
CALLS = ("clone", "lazy clone", "migrate")

pytestmark = [
    pytest.mark.needs("root", "away", "remap", "netns"),
    pytest.mark.slow,
    pytest.mark.timeout(SECONDS + 400),
]


class Chaos:
    """Draws what happens next."""

    def __init__(self, cluster: World, rng: random.Random) -> None:
        self.cluster = cluster
        self.rng = rng
        self.done: dict[str, int] = {}

    def run(self, seconds: float) -> None:
        """Let things happen for so long, and hold them to what must be."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with ExitStack() as trouble:
                # So that a seed draws the same, whatever took how long.
                for happen in self._draw_troubles():
                    happen(trouble)
                for _ in range(self.rng.randrange(1, 4)):
                    self._step()
            self.cluster.laid()
            self.cluster.check_bytes()
            self.cluster.check_books()

    def _step(self) -> None:
        arenas = self.cluster.arenas
        steps: list[Callable[[Held], None]] = [self._write, self._evict, self._clone, self._clone]
        steps += [self._share, self._fetch, self._close]
        if len(arenas) < 2 or (len(arenas) < ARENAS_MAX and self.rng.random() < 0.2):
            self._count("create")
            host = self.rng.choice(self.cluster.hosts)
            seed = self.rng.choice((*SEEDS, 0))
            self.cluster.create(host, self.rng.randrange(1, PAGES_MAX), seed)
            return
        step = self.rng.choice(steps)
        self._count(step.__name__.strip("_"))
        step(self.rng.choice(arenas))

    def _write(self, held: Held) -> None:
        for _ in range(self.rng.randrange(1, 20)):
            self.cluster.write(held, self.rng.randrange(held.pages), self.rng.randbytes(16))

    def _evict(self, held: Held) -> None:
        self.cluster.evict(held)

    def _fetch(self, held: Held) -> None:
        self.cluster.fetch(held)

    def _share(self, held: Held) -> None:
        self.cluster.share(held)

    def _close(self, held: Held) -> None:
        self.cluster.close(held)

    def _clone(self, held: Held) -> None:
        call = self.rng.choice(CALLS)
        to = self.rng.choice([host for host in self.cluster.hosts if host != held.host])
        if len(self.cluster.arenas) >= ARENAS_MAX:
            call = "migrate"
        self._count(call)
        _, done = self.cluster.start_clone(call, held, to)
        if self.rng.random() < 0.3:
            self._kill(self.rng.choice(self._victims()))
        done()

    def _victims(self) -> list[str]:
        parts = ("merger", "scanner", "arenas")
        return [f"host-{n}/{part}" for n in self.cluster.hosts for part in parts] + [
            "index",
            "redis",
        ]

    def _kill(self, service: str) -> None:
        self._count(f"kill {service.split('/')[-1]}")
        self.cluster.kill(service)

    def _draw_troubles(self) -> list[Callable[[ExitStack], None]]:
        every = [self._failpoints, self._killed, self._apart, self._bad_link, self._application]
        return self.rng.sample(every, self.rng.choice((0, 1, 1, 2)))

    def _failpoints(self, _: ExitStack) -> None:
        for name in self.rng.sample(sorted(FAILPOINTS), 4):
            action = self.rng.choice(("kill", "kill", "error", "sleep 0.2"))
            self._count(f"failpoint {action.split()[0]}")
            self.cluster.lay(name, action)

    def _killed(self, _: ExitStack) -> None:
        self._kill(self.rng.choice(self._victims()))

    def _application(self, _: ExitStack) -> None:
        self._count("kill application")
        self.cluster.kill_application(self.rng.choice(self.cluster.hosts))

    def _apart(self, trouble: ExitStack) -> None:
        self._count("apart")
        one, other = self.rng.sample([*self.cluster.hosts, "index"], 2)
        link = self.cluster.link
        trouble.enter_context(links.apart_for(TROUBLE_SECONDS, link(one), link(other)))

    def _bad_link(self, trouble: ExitStack) -> None:
        self._count("bad link")
        host = self.rng.choice(self.cluster.hosts)
        network = self.cluster.network
        trouble.enter_context(
            links.impaired(
                network.bridge,
                self.cluster.link(host),
                self.cluster.namespace(host),
                delay_ms=self.rng.choice((0, 1, 20)),
                loss=self.rng.choice((0, 0.02, 0.05)),
                reorder=self.rng.choice((0, 0.2)),
                seed=self.rng.randrange(1000),
            )
        )

    def _count(self, name: str) -> None:
        self.done[name] = self.done.get(name, 0) + 1


def test_chaos(tmp_path: Path) -> None:
    seed = int(os.environ.get("SAMEPAGE_CHAOS_SEED") or random.randrange(1, 2**32))
    print(f"SAMEPAGE_CHAOS_SEED={seed}")
    settings = {"min_holders": 1, "lost_seconds": 600, "hold_lease_seconds": 20}
    with world(tmp_path, HOSTS, **settings) as cluster:
        chaos = Chaos(cluster, random.Random(seed))
        try:
            chaos.run(SECONDS)
        finally:
            print(dict(sorted(chaos.done.items())))
        cluster.close_all()
        cluster.check_gone()
