"""Whether a process has ended, as a later merger sees it: real processes, in every state."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from helpers.waiting import wait_until

from samepage_merger.cluster.process import UNKNOWN, has_ended, identify

# The first thread ends, and another goes on with all of the memory.
_LEADERLESS = """
import ctypes, sys, threading
threading.Thread(target=sys.stdin.read).start()
print("ready", flush=True)
ctypes.CDLL(None).syscall(60, 0)
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def await_end(pid: int) -> None:
    """Return when a process has ended; it is a zombie then."""
    fd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(20_000)
    os.close(fd)


def test_process_that_lives_has_not_ended(child: subprocess.Popen[bytes]) -> None:
    assert not has_ended(identify(child.pid))
    assert not has_ended(identify(os.getpid()))


def test_process_that_nobody_has_reaped_has_ended(child: subprocess.Popen[bytes]) -> None:
    process = identify(child.pid)
    child.kill()
    await_end(child.pid)
    assert has_ended(process)
    child.wait()
    assert has_ended(process)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the test has exit() by its number")
def test_process_whose_first_thread_has_ended_lives() -> None:
    command = [sys.executable, "-c", _LEADERLESS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as leaderless:
        assert leaderless.stdout is not None
        assert leaderless.stdout.readline() == b"ready\n"
        process = identify(leaderless.pid)
        wait_until(lambda: _state(leaderless.pid) == "Z")
        assert not has_ended(process)
        leaderless.kill()
        await_end(leaderless.pid)
        assert has_ended(process)


def test_number_that_another_process_has_now(child: subprocess.Popen[bytes]) -> None:
    process = identify(child.pid)
    other = identify(os.getpid())
    if process.inode == other.inode:
        pytest.skip("this kernel gives all processes' descriptors one inode (before Linux 6.9)")
    assert has_ended(replace(process, inode=process.inode + 1))


def test_what_cannot_be_told_has_not_ended(child: subprocess.Popen[bytes]) -> None:
    process = identify(child.pid)
    child.kill()
    child.wait()
    assert has_ended(process)
    assert not has_ended(replace(process, namespace="4:1"))
    assert not has_ended(UNKNOWN)
    assert not has_ended(replace(process, pid=-1))
    # Of another pid namespace, as the socket tells of it.
    assert identify(0) == UNKNOWN


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]
