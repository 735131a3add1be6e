"""The kernel's answer to: may some living process still map this store?"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.merger_host import open_directory, store_directory

from samepage.daemon.wire import PAGE_SIZE
from samepage_merger.locks import FOREIGN, StoreLocks
from samepage_merger.store import Store, StoreDirectory

ID = bytes(16)
# Holds what it was given, by descriptor or by a mapping alone, says so, and waits to be killed.
HOLDER = """
import mmap, os, sys
fd, how = int(sys.argv[1]), sys.argv[2]
if how == "map":
    memory = mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)
    os.close(fd)
elif how == "fork":
    if os.fork():
        os._exit(0)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path() -> Iterator[Path]:
    with store_directory() as path:
        yield path


@pytest.fixture
def directory(path: Path) -> Iterator[StoreDirectory]:
    directory = open_directory(path)
    directory.open(ID).reserve(1)
    yield directory
    directory.close()


@pytest.fixture
def store(directory: StoreDirectory) -> Store:
    return directory.open(ID)


@pytest.fixture
def locks(store: Store) -> StoreLocks:
    return StoreLocks(store)


def hold(fd: int, how: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start a process that holds a descriptor; this one lets go of it."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(fd), how],
        pass_fds=[fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    os.close(fd)
    assert holder.stdout is not None
    return holder, int(holder.stdout.readline())


def gone(pid: int) -> None:
    """Wait until a process that may be no child of this one has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    select.select([handle], [], [], 10)
    os.close(handle)


@pytest.mark.parametrize("how", ["descriptor", "map", "fork"])
def test_a_lock_stands_until_the_last_process_is_killed(locks: StoreLocks, how: str) -> None:
    number, fd = locks.issue()
    holder, pid = hold(fd, how)
    assert locks.held(number)
    assert locks.live() == {number}
    os.kill(pid, 9)
    gone(pid)
    holder.communicate()
    assert not locks.held(number)
    assert locks.live() == frozenset()


def test_a_mapping_alone_keeps_the_lock(locks: StoreLocks) -> None:
    number, fd = locks.issue()
    memory = mmap.mmap(fd, PAGE_SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ)
    os.close(fd)
    assert locks.held(number)
    memory.close()
    assert not locks.held(number)


def test_a_descriptor_in_flight_keeps_the_lock(locks: StoreLocks) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    number, fd = locks.issue()
    socket.send_fds(here, [b"x"], [fd])
    os.close(fd)
    here.close()
    assert locks.held(number)
    there.close()
    assert not locks.held(number)


def test_all_locks_are_listed(locks: StoreLocks) -> None:
    issued = [locks.issue() for _ in range(50)]
    assert locks.live() == {number for number, _ in issued}
    for _, fd in issued[::2]:
        os.close(fd)
    assert locks.live() == {number for number, _ in issued[1::2]}
    for _, fd in issued[1::2]:
        os.close(fd)
    assert locks.live() == frozenset()


def test_a_restarted_merger_finds_the_locks(path: Path) -> None:
    first = open_directory(path)
    number, fd = StoreLocks(first.open(ID)).issue()
    holder, pid = hold(fd, "map")
    first.close()
    second = open_directory(path)
    locks = StoreLocks(second.open(ID))
    assert locks.live() == {number}
    os.kill(pid, 9)
    holder.communicate()
    assert locks.live() == frozenset()
    second.close()


def test_a_restarted_merger_takes_the_proof(path: Path) -> None:
    first = open_directory(path)
    number, fd = StoreLocks(first.open(ID)).issue()
    first.close()
    second = open_directory(path)
    assert StoreLocks(second.open(ID)).proves(fd, number)
    os.close(fd)
    second.close()


def test_only_the_owner_proves_a_lock(locks: StoreLocks, store: Store) -> None:
    number, fd = locks.issue()
    other_number, other = locks.issue()
    unlocked = store.open_for_agent()
    assert locks.proves(fd, number)
    assert locks.proves(other, other_number)
    assert not locks.proves(other, number)
    assert not locks.proves(unlocked, number)
    assert not locks.proves(fd, number + 1)
    assert not locks.proves(fd, FOREIGN)
    assert not locks.proves(fd, 2**64 - 1)
    for descriptor in (fd, other, unlocked):
        os.close(descriptor)


def test_a_lock_of_ones_own_making_does_not_take_over_a_living_one(
    locks: StoreLocks, store: Store
) -> None:
    number, fd = locks.issue()
    thief = store.open_for_agent()
    fcntl.fcntl(thief, fcntl.F_OFD_SETLK, struct.pack("@hhqqi0q", fcntl.F_RDLCK, 0, number, 1, 0))
    assert not locks.proves(thief, number)
    os.close(thief)
    assert locks.proves(fd, number)
    os.close(fd)


def test_no_other_file_proves_a_lock(
    locks: StoreLocks, directory: StoreDirectory, store: Store
) -> None:
    number, fd = locks.issue()
    elsewhere = StoreLocks(directory.open(bytes([1] * 16)))
    assert not elsewhere.is_store(fd)
    assert not elsewhere.proves(fd, number)
    read_end, write_end = os.pipe()
    path_only = os.open(f"/proc/self/fd/{fd}", os.O_PATH)
    for descriptor in (read_end, write_end, path_only):
        assert not locks.proves(descriptor, number)
        os.close(descriptor)
    os.close(fd)


def test_a_range_that_could_hide_numbers_is_not_taken_for_one(
    locks: StoreLocks, store: Store
) -> None:
    number, fd = locks.issue()
    other = store.open_for_agent()
    lock = struct.pack("@hhqqi0q", fcntl.F_RDLCK, 0, number - 5, 0, 0)
    fcntl.fcntl(other, fcntl.F_OFD_SETLK, lock)
    assert FOREIGN in locks.live()
    os.close(other)
    assert locks.live() == {number}
    os.close(fd)


def test_an_agent_cannot_lock_the_merger_out(locks: StoreLocks, store: Store) -> None:
    fd = store.open_for_agent()
    exclusive = struct.pack("@hhqqi0q", fcntl.F_WRLCK, 0, 0, 0, 0)
    with pytest.raises(OSError):
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, exclusive)
    number, issued = locks.issue()
    assert locks.held(number)
    os.close(issued)
    os.close(fd)
