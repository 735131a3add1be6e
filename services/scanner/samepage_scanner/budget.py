"""What background passes may cost: a share of one core, for all that they make others do as well.

Charged are the scanner's own CPU time, that of the agents' threads while an order or a merge is
under way, and what the merger spends on merges. It goes into a bucket that fills as time goes by:
who wants more waits before the next order until the debt is paid, so that even a pass over a
great deal of memory never takes a core for long. Shares are not charged, and wait for nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from samepage.daemon.policies import Policies
from samepage_scanner.books import Agent
from samepage_scanner.config import Config

WINDOW_SECONDS = 60.0

# What is saved up while there is nothing to do, in seconds of the budget.
_BURST_SECONDS = 2.0
# A sleeper looks so often whether the policy is still what it was.
_NAP_SECONDS = 0.5


class Budget:
    """The budget of background passes. Build it inside the event loop.

    Args:
        hurry: set while something must not wait for background passes.

    Attributes:
        spent: CPU seconds charged so far.
    """

    def __init__(self, policies: Policies[Config], hurry: asyncio.Event) -> None:
        self._policies = policies
        self._hurry = hurry
        self._own = time.process_time()
        self._began = self._filled = _now()
        self._saved = 0.0
        self.spent = 0.0
        self._spent: deque[tuple[float, float]] = deque()

    @property
    def percent(self) -> float:
        """What was spent in the last minute (or since the start, if that is less), of a core."""
        self._forget_old()
        seconds = min(WINDOW_SECONDS, max(_now() - self._began, 1.0))
        return 100 * sum(cpu for _, cpu in self._spent) / seconds

    async def admit(self) -> None:
        """Wait until something may be spent, or must not be waited for."""
        self.charge_own()
        while (debt := self._debt_seconds()) > 0 and not self._hurry.is_set():
            await self._nap(min(debt, _NAP_SECONDS))

    @contextmanager
    def watch(self, agents: Collection[Agent]) -> Iterator[None]:
        """Charge what the agents' threads spend meanwhile; where that cannot be seen, all the
        time that it takes."""
        # Agents of one process have their threads in common.
        threads = {agent.peer.pid: agent.threads for agent in agents}.values()
        before = [each.cpu_seconds() for each in threads]
        began = _now()
        try:
            yield
        finally:
            elapsed = _now() - began
            spent = 0.0
            for each, cpu in zip(threads, before, strict=True):
                after = each.cpu_seconds()
                if cpu is None or after is None:
                    spent = elapsed
                    break
                spent += after - cpu
            self.charge(spent)

    def charge(self, cpu: float) -> None:
        """Spend CPU seconds."""
        self._fill()
        self._saved -= cpu
        self.spent += cpu
        self._spent.append((_now(), cpu))
        self._forget_old()

    def charge_own(self) -> None:
        """Charge what this process spent since the last time."""
        now = time.process_time()
        self.charge(now - self._own)
        self._own = now

    def forgive_own(self) -> None:
        """Do not charge what this process spent since the last time."""
        self._own = time.process_time()

    async def _nap(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._hurry.wait()
        except TimeoutError:
            return

    def _fill(self) -> None:
        now = _now()
        most = self._rate * _BURST_SECONDS
        self._saved = min(self._saved + (now - self._filled) * self._rate, most)
        self._filled = now

    def _debt_seconds(self) -> float:
        self._fill()
        return -self._saved / self._rate

    def _forget_old(self) -> None:
        while self._spent and self._spent[0][0] < _now() - WINDOW_SECONDS:
            self._spent.popleft()

    @property
    def _rate(self) -> float:
        return self._policies.current.cpu_percent / 100


class NoBudget:
    """For what must not wait and is not charged."""

    async def admit(self) -> None:
        """Go on."""

    @contextmanager
    def watch(self, agents: Collection[Agent]) -> Iterator[None]:
        """Charge nothing."""
        yield


def _now() -> float:
    return asyncio.get_running_loop().time()
