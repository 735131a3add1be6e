"""Waiting for what no event tells."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_SECONDS = 60.0
_STEP_SECONDS = 0.01


def wait_until(condition: Callable[[], object]) -> None:
    """Look again and again until something is so, where no event loop runs."""
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(_STEP_SECONDS)


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop go on until something is so.

    Raises:
        TimeoutError: it is not after 20 seconds.
    """
    async with asyncio.timeout(_SECONDS):
        while not condition():
            await asyncio.sleep(_STEP_SECONDS)
