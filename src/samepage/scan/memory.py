"""Reading other processes: their mappings, which pages these have, and fingerprints of them."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from samepage import native
from samepage.errors import NotFoundError, SamepageError

PAGE = 4096
_CHUNK_PAGES = 4096  # read at once: 16 MiB
_IOV_MAX = 1024
_PRESENT = np.uint64(1 << 63)
_SWAPPED = np.uint64(1 << 62)
_FILE = np.uint64(1 << 61)
_FRAME = np.uint64((1 << 55) - 1)
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ (\d+)\s*(.*)")

Words = npt.NDArray[np.uint64]
Fingerprints = npt.NDArray[np.uint64]


class DeniedError(SamepageError):
    """This process may not read another's memory; the text says what to do."""


@dataclass(frozen=True)
class Mapping:
    """A stretch of a process's addresses.

    Attributes:
        name: the file, "[heap]", "[stack]", or "[anon]".
    """

    pid: int
    command: str
    name: str
    start: int
    end: int

    @property
    def pages(self) -> int:
        """Its size in pages."""
        return (self.end - self.start) // PAGE


@dataclass
class Pages:
    """The pages that were read, in the order of processes and addresses.

    Attributes:
        mappings: those that have at least one.
        mapping: for each page its mapping's number.
        number: for each page its number within its mapping.
        fingerprints: n x 2 words.
        zero: the fingerprint of a page that holds only zeros.
        frames: physical page numbers, 0 where the kernel does not tell.
        swapped: pages that were left in swap.
        changed: pages that were gone when they should be read.
    """

    mappings: list[Mapping]
    mapping: npt.NDArray[np.uint32]
    number: npt.NDArray[np.uint32]
    fingerprints: Fingerprints
    zero: Fingerprints
    frames: Words
    swapped: int
    changed: int


class _iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)


def mappings(pid: int, files: bool = False) -> list[Mapping]:
    """Return a process's private mappings that could be shared; with `files` also those of files.

    Raises:
        NotFoundError: there is no such process.
        DeniedError: its maps may not be read.
    """
    try:
        command = Path(f"/proc/{pid}/comm").read_text().strip()
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NotFoundError(f"there is no process {pid}") from error
    except PermissionError as error:
        raise denied(pid) from error
    found = []
    for line in lines:
        parsed = _LINE.match(line)
        assert parsed is not None, line
        start, end, flags, inode, name = parsed.groups()
        special = name.startswith("[v")  # vdso, vvar, vsyscall: the kernel's
        if flags[0] != "r" or flags[3] != "p" or special or (inode != "0" and not files):
            continue
        found.append(Mapping(pid, command, name or "[anon]", int(start, 16), int(end, 16)))
    return found


def denied(pid: int) -> DeniedError:
    """What to say when a process's memory may not be read."""
    return DeniedError(
        f"the memory of process {pid} may not be read: run this as its user or as root with "
        "CAP_SYS_PTRACE, and see /proc/sys/kernel/yama/ptrace_scope"
    )


def read(
    wanted: Sequence[Mapping],
    limit_pages: int | None = None,
    progress: Callable[[int], None] = lambda pages: None,
) -> Pages:
    """Read these mappings, at most `limit_pages` pages of them.

    Args:
        progress: told how many pages of address space are through, again and again.

    Raises:
        DeniedError: a process may not be read. One that ends meanwhile is left out.
    """
    reader = _Reader(limit_pages)
    for mapping in wanted:
        reader.read(mapping, progress)
    return reader.result()


class _Reader:
    """Goes through mappings, and collects."""

    def __init__(self, limit_pages: int | None) -> None:
        self._left = limit_pages
        self._seed = secrets.randbits(64)
        self._buffer = np.empty((_CHUNK_PAGES, PAGE), np.uint8)
        self._mappings: list[Mapping] = []
        self._parts: list[tuple[int, npt.NDArray[np.uint32], Fingerprints, Words]] = []
        self._swapped = 0
        self._changed = 0

    def read(self, mapping: Mapping, progress: Callable[[int], None]) -> None:
        """Read one mapping."""
        try:
            with open(f"/proc/{mapping.pid}/pagemap", "rb", buffering=0) as pagemap:
                for first in range(0, mapping.pages, _CHUNK_PAGES):
                    count = min(_CHUNK_PAGES, mapping.pages - first)
                    self._chunk(mapping, pagemap.fileno(), first, count)
                    progress(count)
        except (FileNotFoundError, ProcessLookupError):
            progress(mapping.pages)
        except PermissionError as error:
            raise denied(mapping.pid) from error

    def result(self) -> Pages:
        """Everything together."""
        counts = [len(numbers) for _, numbers, _, _ in self._parts]
        owners = [number for number, _, _, _ in self._parts]
        return Pages(
            mappings=self._mappings,
            mapping=np.repeat(np.array(owners, np.uint32), counts),
            number=np.concatenate([np.empty(0, np.uint32), *(part[1] for part in self._parts)]),
            fingerprints=np.concatenate(
                [np.empty((0, 2), np.uint64), *(part[2] for part in self._parts)]
            ),
            zero=native.fingerprint(bytes(PAGE), 1, self._seed).view(np.uint64)[0],
            frames=np.concatenate([np.empty(0, np.uint64), *(part[3] for part in self._parts)]),
            swapped=self._swapped,
            changed=self._changed,
        )

    def _chunk(self, mapping: Mapping, pagemap: int, first: int, count: int) -> None:
        raw = os.pread(pagemap, 8 * count, (mapping.start // PAGE + first) * 8)
        entries = np.frombuffer(raw[: len(raw) // 8 * 8], np.uint64)
        there = (entries & _PRESENT != 0) & (entries & _FILE == 0)
        self._swapped += int(np.count_nonzero(entries & _SWAPPED))
        pages = np.flatnonzero(there)
        if self._left is not None:
            pages = pages[: self._left]
        if not pages.size:
            return
        got = self._read_pages(mapping, pages + first)
        self._changed += pages.size - got.size
        if self._left is not None:
            self._left -= got.size
        if not got.size:
            return
        prints = native.fingerprint(self._buffer, got.size, self._seed).view(np.uint64)
        if not self._mappings or self._mappings[-1] is not mapping:
            self._mappings.append(mapping)
        frames = entries[got - first] & _FRAME
        self._parts.append((len(self._mappings) - 1, got.astype(np.uint32), prints, frames))

    def _read_pages(self, mapping: Mapping, pages: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """Read pages into the buffer; return those that were still there."""
        got: list[npt.NDArray[np.intp]] = []
        at, filled = 0, 0
        while at < pages.size:
            cuts = np.flatnonzero(np.diff(pages[at:]) != 1) + 1
            bounds = np.concatenate(([0], cuts, [pages.size - at]))[: _IOV_MAX + 1]
            remote = (_iovec * (bounds.size - 1))()
            for i, (first, end) in enumerate(
                zip(bounds.tolist(), bounds[1:].tolist(), strict=False)
            ):
                remote[i].base = mapping.start + int(pages[at + first]) * PAGE
                remote[i].length = (end - first) * PAGE
            asked = int(bounds[-1])
            read = self._vm_read(mapping.pid, filled, remote) // PAGE
            got.append(pages[at : at + read])
            filled += read
            # a page that went meanwhile ends the call: it is left out
            at += asked if read == asked else read + 1
        return np.concatenate(got)

    def _vm_read(self, pid: int, filled: int, remote: ctypes.Array[_iovec]) -> int:
        local = _iovec(
            self._buffer.ctypes.data + filled * PAGE, self._buffer.nbytes - filled * PAGE
        )
        read: int = _libc.process_vm_readv(
            ctypes.c_int(pid),
            ctypes.byref(local),
            ctypes.c_ulong(1),
            remote,
            ctypes.c_ulong(len(remote)),
            ctypes.c_ulong(0),
        )
        if read >= 0:
            return read
        error = ctypes.get_errno()
        if error == errno.EPERM:
            raise denied(pid)
        if error == errno.ESRCH:
            raise ProcessLookupError(error, os.strerror(error))
        return 0


def processes_of_cgroup(path: Path) -> list[int]:
    """Return the processes of a control group and those below it.

    Raises:
        NotFoundError: it is no control group.
    """
    if not (path / "cgroup.procs").is_file():
        raise NotFoundError(f"{path} is no control group: it has no cgroup.procs")
    files = sorted(path.rglob("cgroup.procs"))
    return sorted({int(pid) for file in files for pid in file.read_text().split()})


def processes_matching(pattern: re.Pattern[str]) -> list[int]:
    """Return the processes whose command line the pattern finds, kernel threads left out."""
    return sorted(pid for pid, line in _command_lines() if pattern.search(line))


def _command_lines() -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has ended
        if line and int(folder.name) != os.getpid():
            yield int(folder.name), line.strip()
