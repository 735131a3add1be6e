"""Tasks end, also those that miss that they are cancelled."""

from __future__ import annotations

import asyncio

from samepage.daemon import tasks


async def test_a_task_that_misses_a_cancellation_ends() -> None:
    """What it waits for comes in the same moment, so that asyncio.wait_for() may go on."""
    answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def ask_forever() -> None:
        await asyncio.wait_for(answer, 60)
        await asyncio.Event().wait()

    task = asyncio.ensure_future(ask_forever())
    await asyncio.sleep(0)
    answer.set_result(None)
    async with asyncio.timeout(20):
        await tasks.end([task])
    assert task.cancelled()


async def test_tasks_that_have_ended_are_no_error() -> None:
    ended = asyncio.ensure_future(asyncio.sleep(0))
    await ended
    await tasks.end([ended])
    await tasks.end([])
