"""Tasks that are ended for certain."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

_AGAIN_SECONDS = 0.1


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks that need no time to clean up, and return when they have ended.

    They are cancelled again and again: before Python 3.12 asyncio.wait_for(), which redis-py calls
    for every command, takes a cancellation for the end of what it waits for when that comes in the
    same moment (https://github.com/python/cpython/issues/86296), and the task goes on.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_AGAIN_SECONDS)
