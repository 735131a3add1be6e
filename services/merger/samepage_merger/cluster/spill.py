"""The spill file: pages on disk that no other host holds, found by their digests.

Theory. A directory of segments, each written once from its start to its end, in frames: a header
with the digests of up to 512 pages, then the pages, all of it aligned to pages. A frame counts only
when it was synced, and whoever spilled a page lets go of the copy in memory only then. So a merger
that is killed at any instant leaves whole frames, and perhaps a torn one at the end of the newest
segment, which nobody relies on. The one that comes next reads the headers, and begins a new
segment.

What the index says of a page is a hint: 8 bytes of its digest, and where it is. Whoever writes a
page that seems to be there compares the bytes, whoever reads one checks its digest. So neither a
torn frame, nor a hole, nor a bad disk is ever taken for the page.

A page that nobody needs any more is punched out of its segment; a segment without pages is removed.
After a restart the pages of holes are in the index again, until they are found not to be needed.
Files are only touched in one thread, the index only in the event loop's.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import structlog

from samepage.daemon.wire import DIGEST_BYTES, PAGE_SIZE
from samepage_merger.cluster.away import Bytes, Digests, Mask
from samepage_merger.cluster.keys import Keys, KeyTable, keys_of
from samepage_merger.cluster.segment import FRAME_PAGES_MAX, SEGMENT_PAGES, Segment, header_pages
from samepage_merger.runs import Int64s, join
from samepage_merger.view import StoreError

_NAME = re.compile(r"[0-9a-f]{12}\.spill")
_WARN_SECONDS = 60.0
T = TypeVar("T")

log = structlog.get_logger(__name__)


@dataclass
class SpillCounts:
    """What happened since start, in pages; `errors` counts failed reads and writes."""

    written: int = 0
    read: int = 0
    no_room: int = 0
    bad: int = 0
    errors: int = 0


class Spill:
    """The spill files of a host.

    Args:
        path: a directory, this merger's alone; made if missing.
        limit_bytes: what they may take.

    Attributes:
        counts: of pages, since start.

    Raises:
        StoreError: the directory will not do, or another merger has it.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self.path = path
        self._lock_fd = _lock(path)
        self._thread = ThreadPoolExecutor(1, "spill")
        self._index = KeyTable()
        self._segments: dict[int, Segment] = {}
        self._current: Segment | None = None
        self._closed = False
        self._next_warning = 0.0
        self.limit_bytes = limit_bytes
        self.counts = SpillCounts()
        self._first_own = 0
        try:
            self._open_all()
        except OSError as error:
            self.close()
            raise StoreError(f"cannot read the spill files in {path}: {error.strerror}") from error

    def __len__(self) -> int:
        """Pages in the index."""
        return len(self._index)

    @property
    def used_bytes(self) -> int:
        """Bytes that the files take on disk."""
        return sum(segment.used_bytes for segment in list(self._segments.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the index takes."""
        return self._index.nbytes

    async def write(self, digests: Digests, data: Bytes) -> Mask:
        """Let pages be in the files, and synced; return for which that is so.

        What is there already is compared, and not written again. The digests must be pinned from
        before this call until they are known to be away, or nobody relies on them.
        """
        once, of_each = _distinct(digests)
        digests, data = digests[once], _pages(data, once)
        number, location = self._index.find(keys_of(digests))
        there = await self._run(lambda: self._compare(number, location, data, len(digests)))
        for low in range(0, len(digests), FRAME_PAGES_MAX):
            part = low + np.flatnonzero(~there[low : low + FRAME_PAGES_MAX])
            if part.size:
                there[part] = await self._append(digests[part], _pages(data, part))
        return there[of_each]

    async def read(self, digests: Digests, check: Callable[[Digests, Bytes], Mask]) -> Found:
        """Return the pages that are in the files.

        Args:
            check: says which pages have their digests; called in the spill's thread.
        """
        number, location = self._index.find(keys_of(digests))
        return await self._run(lambda: self._load(digests, number, location, check))

    def entries(self) -> tuple[Keys, Int64s]:
        """Return the keys of all pages in the files, and where each is; of this instant."""
        return self._index.all()

    def begun_before(self, locations: Int64s) -> Mask:
        """Return which pages are from before this merger's start."""
        old: Mask = locations < self._first_own * SEGMENT_PAGES
        return old

    async def drop(self, locations: Int64s) -> None:
        """Forget pages that nobody needs, and give back their space."""
        self._index.remove(locations)
        await self._run(lambda: self._reclaim(np.sort(locations)))

    def close(self) -> None:
        """Let go of the files; they stay when there are pages in them. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._thread.shutdown()
        for segment in self._segments.values():
            os.close(segment.fd)
            if not segment.live:
                segment.path.unlink(missing_ok=True)
        self._segments.clear()
        os.close(self._lock_fd)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _append(self, digests: Digests, data: Bytes) -> bool | Mask:
        """Write one frame of at most FRAME_PAGES_MAX pages; return which are safe."""
        count = await self._run(lambda: self._room(len(digests)))
        safe = np.zeros(len(digests), np.bool_)
        self.counts.no_room += len(digests) - count
        if not count:
            return safe
        first = await self._run(
            lambda: self._write_frame(digests[:count], memoryview(data)[: count * PAGE_SIZE])
        )
        if first is None:
            return safe
        self._index.add(keys_of(digests[:count]), first + np.arange(count))
        self.counts.written += count
        safe[:count] = True
        return safe

    # In the thread.

    def _room(self, pages: int) -> int:
        disk = os.statvfs(self.path)
        allowed, free = self.limit_bytes - self.used_bytes, disk.f_bavail * disk.f_frsize
        left = min(allowed, free) // PAGE_SIZE - header_pages(pages)
        if left < pages:
            self._warn("the disk is full" if free < allowed else "spill_limit_bytes is reached")
        return max(0, min(left, pages))

    def _warn(self, why: str) -> None:
        now = time.monotonic()
        if now >= self._next_warning:
            self._next_warning = now + _WARN_SECONDS
            log.warning(
                "cannot spill: pages stay in memory until there is room, or the limit is raised",
                why=why,
                path=str(self.path),
                used_bytes=self.used_bytes,
                limit_bytes=self.limit_bytes,
            )

    def _compare(self, number: Int64s, location: Int64s, data: Bytes, count: int) -> Mask:
        there = np.zeros(count, np.bool_)
        view = memoryview(data)
        loaded = memoryview(self._load_pages(location))
        for at, page in enumerate(number.tolist()):
            mine = view[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            there[page] |= loaded[at * PAGE_SIZE : (at + 1) * PAGE_SIZE] == mine
        return there

    def _load(
        self,
        digests: Digests,
        number: Int64s,
        location: Int64s,
        check: Callable[[Digests, Bytes], Mask],
    ) -> Found:
        data = self._load_pages(location)
        good = check(digests[number], data) if number.size else np.zeros(0, np.bool_)
        self.counts.bad += int(np.count_nonzero(~good))
        number, first = np.unique(number[good], return_index=True)
        self.counts.read += number.size
        found = np.zeros(len(digests), np.bool_)
        found[number] = True
        return Found(found, _pages(data, np.flatnonzero(good)[first]))

    def _load_pages(self, locations: Int64s) -> bytearray:
        """Return pages; those that cannot be read are zeros."""
        data = bytearray(locations.size * PAGE_SIZE)
        view = memoryview(data)
        starts = np.flatnonzero(np.diff(locations, prepend=locations[:1] - 2) != 1)
        counts = np.diff(starts, append=locations.size)
        for low, count in zip(starts.tolist(), counts.tolist(), strict=True):
            segment = self._segments.get(int(locations[low]) // SEGMENT_PAGES)
            if segment is None:
                continue
            offset = int(locations[low]) % SEGMENT_PAGES * PAGE_SIZE
            try:
                os.preadv(segment.fd, [view[low * PAGE_SIZE : (low + count) * PAGE_SIZE]], offset)
            except OSError as error:
                self.counts.errors += 1
                log.error("cannot read spilled pages", path=str(segment.path), why=error.strerror)
        return data

    def _write_frame(self, digests: Digests, data: memoryview) -> int | None:
        """Return the location of the first page, or None when it could not be written."""
        pages = header_pages(len(digests)) + len(digests)
        segment = self._current
        try:
            if segment is None or segment.size + pages > SEGMENT_PAGES:
                segment = self._begin_segment()
            return segment.append(digests, data)
        except OSError as error:
            # After a failed sync nobody knows what of the segment is on disk: begin a new one.
            self.counts.errors += 1
            self._warn(error.strerror or str(error))
            self._current = None
            if segment is not None:
                segment.cut_off()
                self._remove_if_empty(segment)
            return None

    def _begin_segment(self) -> Segment:
        number = max(self._segments, default=0) + 1
        path = self.path / f"{number:012x}.spill"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        before, self._current = self._current, None
        segment = Segment(number, path, os.open(path, flags, 0o600))
        self._segments[number] = segment
        os.fsync(self._lock_fd)
        self._current = segment
        if before is not None:
            self._remove_if_empty(before)
        return segment

    def _reclaim(self, locations: Int64s) -> None:
        numbers = locations // SEGMENT_PAGES
        for number in np.unique(numbers).tolist():
            segment = self._segments[number]
            within = locations[numbers == number] % SEGMENT_PAGES
            segment.live -= within.size
            if self._remove_if_empty(segment):
                continue
            segment.give_back(within)

    def _remove_if_empty(self, segment: Segment) -> bool:
        if segment.live or (segment is self._current and segment.size < SEGMENT_PAGES // 2):
            return False
        if segment is self._current:
            self._current = None
        del self._segments[segment.number]
        os.close(segment.fd)
        segment.path.unlink(missing_ok=True)
        return True

    def _open_all(self) -> None:
        for name in sorted(os.listdir(self.path)):
            if not _NAME.fullmatch(name):
                log.warning("a file that is no spill file", path=str(self.path / name))
                continue
            fd = os.open(self.path / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            segment = Segment(int(name.split(".")[0], 16), self.path / name, fd)
            self._segments[segment.number] = segment
            # What its writer did not live to sync would count as there from now on.
            os.fsync(fd)
            for first, digests in segment.frames():
                self._index.add(keys_of(digests), first + np.arange(len(digests)))
                segment.live += len(digests)
            segment.measure()
            self._remove_if_empty(segment)
        self._first_own = max(self._segments, default=0) + 1
        if len(self._index):
            log.info("spilled pages found", pages=len(self._index), bytes=self.used_bytes)


@dataclass(frozen=True)
class Found:
    """Which pages were found, and the bytes of those, in order."""

    mask: Mask
    data: Bytes = field(repr=False)


def _pages(data: Bytes, numbers: npt.NDArray[np.integer]) -> Bytes:
    """Return some of consecutive pages (ascending)."""
    view = memoryview(data)
    if numbers.size * PAGE_SIZE == len(view):
        return view
    first, count = join(numbers.astype(np.int64))
    return b"".join(
        view[low * PAGE_SIZE : (low + pages) * PAGE_SIZE]
        for low, pages in zip(first.tolist(), count.tolist(), strict=True)
    )


def _distinct(digests: Digests) -> tuple[Int64s, Int64s]:
    """Return where each different digest is first, ascending, and for each which of those it is."""
    packed = np.ascontiguousarray(digests).view(f"S{DIGEST_BYTES}").reshape(-1)
    _, first, inverse = np.unique(packed, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    return first[order], rank[inverse]


def _lock(path: Path) -> int:
    """Return the directory's descriptor, which keeps other mergers out as long as it is open."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(
            f"cannot use spill_dir {path} ({error.strerror}): set spill_dir to a directory that the"
            " merger may write"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise StoreError(
            f"another merger uses spill_dir {path}: stop it first, or give this one a spill_dir of"
            " its own"
        ) from error
    return fd
