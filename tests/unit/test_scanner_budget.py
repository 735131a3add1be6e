"""The bucket that background passes pay from."""

from __future__ import annotations

import asyncio
import os

import pytest

from samepage.daemon.peers import Peer
from samepage.daemon.policies import Policies
from samepage.v1.scanner_pb2 import ScannerPolicy
from samepage_scanner import budget as module
from samepage_scanner.books import Agent
from samepage_scanner.budget import Budget
from samepage_scanner.config import Config
from samepage_scanner.threads import Threads


class Clock:
    """Time that passes only when the budget's owner sleeps."""

    now = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()

    async def nap(budget: Budget, seconds: float) -> None:
        # As a real timer does, it sleeps somewhat longer.
        clock.now += seconds + 1e-6

    monkeypatch.setattr(module, "_now", lambda: clock.now)
    monkeypatch.setattr(Budget, "_nap", nap)
    return clock


@pytest.fixture
def policies() -> Policies[Config]:
    return Policies(Config(cpu_percent=10.0))


async def test_use_is_a_tenth_whatever_the_orders_cost(
    clock: Clock, policies: Policies[Config]
) -> None:
    budget = Budget(policies, asyncio.Event())
    for cost in (0.001, 0.01, 0.5):
        began, spent = clock.now, 0.0
        while clock.now < began + 300:
            await budget.admit()
            budget.charge(cost)
            spent += cost
        assert spent / (clock.now - began) == pytest.approx(0.1, rel=0.05)
        assert budget.percent == pytest.approx(10, rel=0.1)


async def test_what_is_saved_up_is_little(clock: Clock, policies: Policies[Config]) -> None:
    budget = Budget(policies, asyncio.Event())
    clock.now += 3600
    began, spent = clock.now, 0.0
    while clock.now < began + 60:
        await budget.admit()
        budget.charge(0.01)
        spent += 0.01
    assert spent / 60 < 0.12


async def test_change_of_policy_is_in_force_while_waiting(
    clock: Clock, policies: Policies[Config]
) -> None:
    budget = Budget(policies, asyncio.Event())
    budget.charge(100.0)
    policies.change(ScannerPolicy(cpu_percent=100.0))
    began = clock.now
    await budget.admit()
    assert clock.now - began == pytest.approx(100, abs=1)


async def test_share_ends_all_waiting(policies: Policies[Config]) -> None:
    hurry = asyncio.Event()
    budget = Budget(policies, hurry)
    budget.charge(1e6)
    waiting = asyncio.create_task(budget.admit())
    await asyncio.sleep(0)
    assert not waiting.done()
    hurry.set()
    async with asyncio.timeout(10):
        await waiting


async def test_last_minute_is_forgotten(clock: Clock, policies: Policies[Config]) -> None:
    budget = Budget(policies, asyncio.Event())
    clock.now += 600
    budget.charge(6.0)
    assert budget.percent == pytest.approx(10)
    clock.now += 61
    assert budget.percent == 0


async def test_threads_that_cannot_be_seen_cost_all_the_time(
    clock: Clock, policies: Policies[Config]
) -> None:
    budget = Budget(policies, asyncio.Event())
    agents = []
    for pid in (0, 0, -1):
        peer = Peer.__new__(Peer)
        peer.pid = pid
        agents.append(Agent(peer, Threads(pid)))
    with budget.watch(agents):
        clock.now += 0.3
    clock.now += 60 - 0.3
    assert budget.percent == pytest.approx(100 * 0.3 / 60)


def test_threads_of_a_process_without_agents_are_not_seen() -> None:
    assert Threads(os.getpid()).cpu_seconds() is None
