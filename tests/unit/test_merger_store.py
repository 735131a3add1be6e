"""The store's file: what is never given twice, and what agents cannot do with their descriptors."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.merger_host import open_directory, store_directory

from samepage.daemon.wire import PAGE_SIZE
from samepage_merger.store import Store, StoreDirectory, StoreFullError
from samepage_merger.view import StoreError

ID = bytes(range(16))


@pytest.fixture
def path() -> Iterator[Path]:
    with store_directory() as path:
        yield path


@pytest.fixture
def directory(path: Path) -> Iterator[StoreDirectory]:
    directory = open_directory(path)
    yield directory
    directory.close()


@pytest.fixture
def store(directory: StoreDirectory) -> Store:
    return directory.open(ID)


def page(byte: int) -> bytes:
    return bytes([byte]) * PAGE_SIZE


def test_slots_begin_at_one_and_follow_each_other(store: Store) -> None:
    assert store.reserve(3) == 1
    assert store.reserve(1) == 4
    assert store.resident_bytes() == 0
    store.write(2, page(1) * 2)
    assert store.resident_bytes() == 2 * PAGE_SIZE


def test_written_slots_are_seen_through_an_agents_descriptor(store: Store) -> None:
    fd = store.open_for_agent()
    slot = store.reserve(2)
    store.write(slot, page(1) + page(2))
    assert os.pread(fd, 2 * PAGE_SIZE, slot * PAGE_SIZE) == page(1) + page(2)
    assert store.read(slot, 2) == page(1) + page(2)
    os.close(fd)


def test_freed_slots_give_their_memory_back_and_others_stay(store: Store) -> None:
    store.reserve(10)
    for slot in range(1, 11):
        store.write(slot, page(slot))
    store.free(np.array([2, 3, 4, 7, 10]))
    assert store.resident_bytes() == 5 * PAGE_SIZE
    for slot in (1, 5, 6, 8, 9):
        assert store.read(slot, 1) == page(slot)
    assert store.read(7, 1) == bytes(PAGE_SIZE)
    assert store.reserve(1) == 11


def test_free_all_but(store: Store) -> None:
    store.write(store.reserve(8), page(5) * 8)
    store.free_all_but(np.array([2, 3, 8]))
    assert store.resident_bytes() == 3 * PAGE_SIZE
    store.free_all_but(np.empty(0, np.int64))
    assert store.resident_bytes() == 0


def test_numbers_are_never_used_twice_over_a_restart(path: Path) -> None:
    first = open_directory(path)
    store = first.open(ID)
    slot = store.reserve(5)
    store.write(slot, page(9))
    first.close()
    second = open_directory(path)
    assert list(second.existing()) == [ID]
    again = second.open(ID)
    assert again.read(slot, 1) == page(9)
    assert again.reserve(1) == slot + 5
    second.close(lambda domain_id: True)
    assert not path.exists()


def test_the_limit_is_an_answer(path: Path) -> None:
    directory = open_directory(path, limit_bytes=4 * PAGE_SIZE)
    store = directory.open(ID)
    slot = store.reserve(5)
    store.write(slot, page(1) * 3)
    with pytest.raises(StoreFullError):
        store.write(slot + 3, page(2) * 2)
    assert store.room(2) == 1 and store.room(1) == 1
    store.free(np.array([slot]))
    store.write(slot + 3, page(2) * 2)
    assert store.resident_bytes() == 4 * PAGE_SIZE
    directory.close()


def test_a_full_tmpfs_is_an_answer(path: Path) -> None:
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"needs root: cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        directory = open_directory(path, limit_bytes=1 << 30)
        store = directory.open(ID)
        slot = store.reserve(30)
        store.write(slot, page(1) * 10)
        with pytest.raises(StoreFullError):
            store.write(slot + 10, page(2) * 10)
        store.free(np.arange(slot + 10, slot + 20))
        assert store.resident_bytes() == 10 * PAGE_SIZE
        store.write(slot + 20, page(3) * 2)
        assert store.read(slot, 1) == page(1) and store.read(slot + 21, 1) == page(3)
        directory.close()
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_tmpfs_with_huge_pages_is_refused(path: Path) -> None:
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "huge=always", "tmpfs", path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"needs root: cannot mount: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(StoreError, match="huge=never"):
            StoreDirectory(path)
    finally:
        subprocess.run(["umount", path], check=True)


def test_only_a_tmpfs_will_do() -> None:
    with pytest.raises(StoreError, match="not on a tmpfs"):
        StoreDirectory(Path(f"/proc/{os.getpid()}"))


def test_other_files_in_the_directory_are_left_alone(path: Path) -> None:
    path.mkdir()
    for name in ("deadbeef", ID.hex(), "notes.store"):
        (path / name).write_bytes(page(3))
    directory = open_directory(path)
    directory.open(ID)
    assert list(directory.existing()) == [ID]
    directory.close(lambda domain_id: True)
    assert sorted(p.name for p in path.iterdir()) == [ID.hex(), "deadbeef", "notes.store"]


def test_one_merger_a_directory(directory: StoreDirectory, path: Path) -> None:
    with pytest.raises(StoreError, match="another merger"):
        StoreDirectory(path)


class TestAgentsDescriptor:
    """Even as root: the read-only mount refuses, not the file's mode."""

    @pytest.fixture
    def fd(self, store: Store) -> Iterator[int]:
        store.write(store.reserve(1), page(7))
        fd = store.open_for_agent()
        yield fd
        os.close(fd)

    def refused(self, error: int, call: object, *arguments: object) -> None:
        assert callable(call)
        with pytest.raises(OSError) as caught:
            call(*arguments)
        assert caught.value.errno == error

    def test_cannot_be_reopened_for_writing(self, fd: int) -> None:
        self.refused(errno.EROFS, os.open, f"/proc/self/fd/{fd}", os.O_RDWR)
        self.refused(errno.EROFS, os.open, f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_TRUNC)

    def test_cannot_be_written(self, fd: int) -> None:
        self.refused(errno.EBADF, os.pwrite, fd, b"x", 0)
        self.refused(errno.EINVAL, os.ftruncate, fd, 0)

    def test_cannot_be_mapped_shared_and_writable(self, fd: int) -> None:
        with pytest.raises(PermissionError):
            mmap.mmap(fd, PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)

    def test_cannot_be_punched(self, fd: int, store: Store) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        size = ctypes.c_int64(PAGE_SIZE)
        assert libc.fallocate(fd, 3, size, size) == -1
        assert ctypes.get_errno() == errno.EBADF
        assert store.read(1, 1) == page(7)

    def test_cannot_be_changed(self, fd: int) -> None:
        self.refused(errno.EROFS, os.fchmod, fd, 0o666)
        self.refused(errno.EROFS, os.fchown, fd, 1, 1)
        self.refused(errno.EROFS, os.chmod, f"/proc/self/fd/{fd}", 0o666)
        self.refused(errno.EROFS, os.truncate, f"/proc/self/fd/{fd}", 0)
        self.refused(errno.EROFS, os.utime, fd)

    def test_maps_private_and_writable_without_changing_the_store(
        self, fd: int, store: Store
    ) -> None:
        with mmap.mmap(
            fd, 2 * PAGE_SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
        ) as memory:
            assert memory[PAGE_SIZE:] == page(7)
            memory[PAGE_SIZE] = 0
        assert store.read(1, 1) == page(7)

    def test_nor_in_a_process_that_inherited_it(self, fd: int) -> None:
        script = (
            "import errno, os, sys\n"
            "try: os.open(f'/proc/self/fd/{sys.argv[1]}', os.O_RDWR)\n"
            "except OSError as error: sys.exit(error.errno)\n"
        )
        done = subprocess.run([sys.executable, "-c", script, str(fd)], pass_fds=[fd])
        assert done.returncode == errno.EROFS


class TestReadOnlyDirectory:
    """A second mount that the operator made."""

    @pytest.fixture
    def mounted(self, path: Path) -> Iterator[Path]:
        path.mkdir(mode=0o700)
        view = path.with_name("view")
        view.mkdir()
        for arguments in (f"--bind {path} {view}", f"-o remount,bind,ro {view}"):
            done = subprocess.run(["mount", *arguments.split()], capture_output=True)
            if done.returncode:
                pytest.skip(f"needs root: cannot bind-mount: {done.stderr.decode().strip()}")
        yield view
        subprocess.run(["umount", view], check=True)

    def test_serves(self, path: Path, mounted: Path) -> None:
        directory = StoreDirectory(path, mounted)
        store = directory.open(ID)
        fd = store.open_for_agent()
        with pytest.raises(OSError) as caught:
            os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        assert caught.value.errno == errno.EROFS
        os.close(fd)
        directory.close(lambda domain_id: True)
        assert path.exists()

    def test_of_another_directory_is_refused(self, path: Path, mounted: Path) -> None:
        with pytest.raises(StoreError, match="is another directory"):
            StoreDirectory(path.with_name("other"), mounted)

    def test_that_can_be_written_is_refused(self, path: Path) -> None:
        with pytest.raises(StoreError, match="can be written"):
            StoreDirectory(path, path)

    def test_that_is_missing_is_refused(self, path: Path) -> None:
        with pytest.raises(StoreError, match="cannot open store_readonly_dir"):
            StoreDirectory(path, path / "nowhere")


def test_without_the_right_to_mount_the_error_says_what_to_do(path: Path) -> None:
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from samepage_merger.store import StoreDirectory\n"
        "from samepage_merger.view import StoreError\n"
        "if os.geteuid() == 0:\n"
        "    os.setgid(65534); os.setuid(65534)\n"
        "try: StoreDirectory(Path(sys.argv[1]))\n"
        "except StoreError as error: print(error)\n"
    )
    parent = path.with_name("anyone")
    parent.mkdir()
    parent.chmod(0o777)
    path.parent.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", script, parent / "store"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "CAP_SYS_ADMIN" in done.stdout and "store_readonly_dir" in done.stdout
    assert done.stderr == ""
