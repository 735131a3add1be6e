"""A real application process for tests: one that uses the public client, driven over its pipes.

`Application(directory)` starts it; a method call runs in it and returns what it returns. Bytes are
made there from a seed, so that large memory never crosses the pipe.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self
from unittest import mock

PAGE = 4096
_PR_SET_DUMPABLE = 4
_MCL_FUTURE = 2


class ApplicationError(Exception):
    """The call raised in the application; `kind` is the exception's class name."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Application:
    """The test's side."""

    def __init__(
        self, directory: Path, *, env: dict[str, str] | None = None, user: int | None = None
    ) -> None:
        settings = {**os.environ, "SAMEPAGE_DIR": str(directory), **(env or {})}
        command = [sys.executable, __file__] + ([] if user is None else [str(user)])
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=settings,
        )
        self.pid = self.process.pid

    def start(self, call: str, *args: object) -> None:
        """Begin a call; `finish` waits for its result."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([call, *args]) + "\n")
        self.process.stdin.flush()

    def finish(self) -> Any:
        """Return the result of the call that was begun."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ApplicationError("EOFError", f"it ended with {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ApplicationError(*answer["error"])
        return answer["result"]

    def call(self, call: str, *args: object) -> Any:
        """Run a function of `Served` there and return its result."""
        self.start(call, *args)
        return self.finish()

    def end(self) -> None:
        """End the process, whatever it does."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def content(seed: int, pages: int) -> bytes:
    """The bytes that `fill` writes."""
    return random.Random(seed).randbytes(pages * PAGE)


class Served:
    """The application's side: every method may be called."""

    def __init__(self) -> None:
        import samepage

        if len(sys.argv) > 1:
            become(int(sys.argv[1]))
        self.node = samepage.connect()
        self.arenas: dict[str, samepage.Arena] = {}
        self.views: dict[str, memoryview] = {}
        self.reserved: object = None

    def create(self, name: str, pages: int, domain: str | None = None) -> None:
        """Make an arena and take a view of it."""
        self.arenas[name] = self.node.create_arena(name, pages * PAGE, domain)
        self.views[name] = self.arenas[name].buffer

    def domain(self, name: str) -> str:
        """What domain an arena is in."""
        return self.arenas[name].domain

    def fill(self, name: str, seed: int, page: int = 0, pages: int | None = None) -> None:
        """Write bytes made from a seed."""
        view = self.views[name]
        pages = len(view) // PAGE - page if pages is None else pages
        view[page * PAGE : (page + pages) * PAGE] = content(seed, pages)

    def write(self, name: str, offset: int, data: str) -> None:
        """Write bytes given in hex."""
        raw = bytes.fromhex(data)
        self.views[name][offset : offset + len(raw)] = raw

    def rewrite(self, name: str, seconds: float) -> int:
        """Change every page over and over, for so long; how many times that was."""
        view = self.views[name]
        end = time.monotonic() + seconds
        rounds = 0
        while time.monotonic() < end:
            rounds += 1
            for at in range(0, len(view), PAGE):
                struct.pack_into("<Q", view, at, rounds << 32 | at)
            time.sleep(0.05)
        return rounds

    def hammer(self, name: str, rounds: int) -> tuple[list[int], int]:
        """Count up in every 16th page while the arena is shared and unshared in turn: for so many
        rounds at least, and until something was merged.

        Returns the counters that are not what was counted, and how many pages were merged.
        """
        view = self.views[name]
        counters = range(0, len(view), 16 * PAGE)
        for at in counters:
            struct.pack_into("<Q", view, at, 0)

        merged = 0

        def count_up() -> int:
            number = 0
            while number < rounds or not merged:
                number += 1
                for at in counters:
                    assert struct.unpack_from("<Q", view, at)[0] == number - 1
                    struct.pack_into("<Q", view, at, number)
            return number

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            counting = pool.submit(count_up)
            while not counting.done():
                merged += self.arenas[name].share().merged
                self.arenas[name].unshare()
            last = counting.result()
        counted = [struct.unpack_from("<Q", view, at)[0] for at in counters]
        return [number for number in counted if number != last], merged

    def read(self, name: str, offset: int, length: int) -> str:
        """Return bytes in hex."""
        return bytes(self.views[name][offset : offset + length]).hex()

    def digest(self, name: str) -> str:
        """SHA-256 of a view."""
        return hashlib.sha256(self.views[name]).hexdigest()

    def share(self, name: str, timeout: float = 30.0) -> dict[str, int]:
        """Share an arena; the report's counters."""
        from dataclasses import asdict

        return asdict(self.arenas[name].share(timeout=timeout))

    def stats(self, name: str) -> dict[str, int]:
        """The arena's counters."""
        from dataclasses import asdict

        return asdict(self.arenas[name].stats())

    def unshare(self, name: str) -> None:
        """Make every page private."""
        self.arenas[name].unshare()

    def close(self, name: str, keep_view: bool = False) -> None:
        """Close an arena."""
        if not keep_view:
            self.views.pop(name).release()
        self.arenas.pop(name).close()

    def disconnect(self) -> None:
        """Close the node; views stay."""
        self.node.close()

    def pagemap(self, name: str) -> list[int]:
        """The kernel's view: bits 63, 62 and 61 of every page's entry (present, swapped, file)."""
        import ctypes

        view = self.views[name]
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(address // PAGE * 8)
            entries = file.read(len(view) // PAGE * 8)
        return [entry >> 61 for (entry,) in struct.iter_unpack("<Q", entries)]

    def pss(self, name: str) -> int:
        """The arena's proportional set size in bytes, as /proc/self/smaps adds it up."""
        import ctypes

        view = self.views[name]
        start = ctypes.addressof(ctypes.c_char.from_buffer(view))
        inside, total = False, 0
        with open("/proc/self/smaps") as file:
            for line in file:
                first, *rest = line.split()
                if "-" in first:
                    inside = start <= int(first.split("-")[0], 16) < start + len(view)
                elif inside and first == "Pss:":
                    total += int(rest[0]) * 1024
        return total

    def mappings(self, name: str) -> list[tuple[int, int, int, int]]:
        """What /proc/self/maps says of an arena: (first page, pages, inode, first slot)."""
        import ctypes

        view = self.views[name]
        start = ctypes.addressof(ctypes.c_char.from_buffer(view))
        found = []
        with open("/proc/self/maps") as file:
            for line in file:
                span, _, offset, _, inode, *_ = line.split(maxsplit=5)
                low, high = (int(part, 16) for part in span.split("-"))
                if low < start + len(view) and high > start:
                    first, last = max(low, start), min(high, start + len(view))
                    slot = (int(offset, 16) + first - low) // PAGE if int(inode) else 0
                    page = (first - start) // PAGE
                    found.append((page, (last - first) // PAGE, int(inode), slot))
        return found

    def run_threads(self, count: int) -> None:
        """Run so many at once: their stacks and heaps stay mapped, for those that come later."""
        import threading

        together = threading.Barrier(count)
        threads = [threading.Thread(target=together.wait) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def mapping_count(self) -> int:
        """How many mappings this process has."""
        with open("/proc/self/maps") as file:
            return sum(1 for _ in file)

    def protections(self, name: str, page: int, pages: int) -> list[str]:
        """What a part of an arena may be used for, by mapping, as /proc/self/maps has it."""
        import ctypes

        memory = self.arenas[name]._memory
        assert memory is not None
        start = ctypes.addressof(memory) + page * PAGE
        with open("/proc/self/maps") as file:
            parts = [line.split()[:2] for line in file]
        bounds = [([int(at, 16) for at in span.split("-")], kind) for span, kind in parts]
        return [kind for (low, high), kind in bounds if low < start + pages * PAGE and high > start]

    def unshare_without_memory(self, name: str) -> None:
        """Unshare with no address space left, so that pages cannot be restored the usual way."""
        import resource

        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * PAGE
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (size, before[1]))
        try:
            self.arenas[name].unshare()
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    def seal(self, name: str) -> None:
        """Make an arena read-only."""
        self.arenas[name].seal()

    def writable(self, name: str) -> bool:
        """Whether a view taken now can be written."""
        return not self.arenas[name].buffer.readonly

    def write_sealed(self, name: str) -> int:
        """How a child process ends that writes to its own sealed arena: a signal's number."""
        import samepage

        child = os.fork()
        if child == 0:
            os.close(2)  # the interpreter would tell of the signal
            with samepage.connect() as node:
                arena = node.create_arena(f"{name}-child", PAGE)
                view = arena.buffer
                view[0] = 1
                arena.seal()
                view[0] = 2
            os._exit(0)
        return os.WTERMSIG(os.waitpid(child, 0)[1])

    def discard(self, name: str, page: int, pages: int) -> None:
        """Give pages back, the library's way."""
        self.arenas[name].discard(page * PAGE, pages * PAGE)

    def system(self, call: str, name: str, page: int, pages: int, *rest: int) -> int:
        """Call madvise, mprotect, munmap and so on with a part of an arena."""
        import ctypes

        start = ctypes.addressof(ctypes.c_char.from_buffer(self.views[name]))
        function = getattr(ctypes.CDLL(None, use_errno=True), call)
        function.restype = ctypes.c_long
        numbers = (start + page * PAGE, pages * PAGE, *rest)
        result: int = function(*(ctypes.c_ulong(number) for number in numbers))
        if result == -1:
            raise OSError(ctypes.get_errno(), call)
        return result

    def change_while_shared(self, name: str, seed: int, rounds: int) -> list[int]:
        """Protect, discard and replace parts of an arena that is shared in a loop meanwhile.

        Returns the pages whose bytes are not what they must be.
        """
        view, pages = self.views[name], len(self.views[name]) // PAGE
        expected, order, over = bytearray(content(seed, pages)), random.Random(seed), False

        def share() -> None:
            while not over:
                self.arenas[name].share()

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            sharing = pool.submit(share)
            for _ in range(rounds):
                page, count = order.randrange(pages - 16), order.randrange(1, 16)
                part = slice(page * PAGE, (page + count) * PAGE)
                match order.randrange(4):
                    case 0:  # read-only for a moment
                        self.system("mprotect", name, page, count, 1)
                        self.system("mprotect", name, page, count, 3)
                    case 1:  # out of reach for a moment
                        self.system("mprotect", name, page, count, 0)
                        self.system("mprotect", name, page, count, 3)
                    case 2:  # discarded
                        self.arenas[name].discard(part.start, part.stop - part.start)
                        expected[part] = bytes(count * PAGE)
                    case 3:  # written with what others have
                        view[part] = content(seed, pages)[part]
                        expected[part] = content(seed, pages)[part]
            over = True
            sharing.result()
        return [
            page
            for page in range(pages)
            if view[page * PAGE : (page + 1) * PAGE] != expected[page * PAGE : (page + 1) * PAGE]
        ]

    def touch(self, name: str, pages: list[int], threads: int) -> list[int]:
        """Read pages in several threads, each all of them from a place of its own on; those that
        are zero."""
        view = self.views[name]

        def read(start: int) -> list[int]:
            order = pages[start:] + pages[:start]
            return [at for at in order if not any(view[at * PAGE : at * PAGE + 64])]

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            starts = [number * len(pages) // threads for number in range(threads)]
            return sorted({page for zero in pool.map(read, starts) for page in zero})

    def clone(
        self,
        call: str,
        source: str,
        name: str,
        timeout: float = 30.0,
        options: dict[str, float] | None = None,
    ) -> list[tuple[int, int, int]]:
        """Clone or migrate an arena and take a view of it; the progress that was told."""
        from dataclasses import astuple

        told: list[tuple[int, int, int]] = []
        self.arenas[name] = getattr(self.node, call)(
            source,
            name,
            timeout=timeout,
            progress=lambda step: told.append(astuple(step)),
            **options or {},
        )
        self.views[name] = self.arenas[name].buffer
        return told

    def clone_until_interrupted(self, source: str, name: str, starting: bool) -> bool:
        """Whether KeyboardInterrupt ends a clone; SIGINT is to come in the middle of it.

        Args:
            starting: let it come while the call's thread is being started.
        """
        start = threading.Thread.start

        def start_and_wait(thread: threading.Thread) -> None:
            start(thread)
            signal.pause()

        with mock.patch.object(threading.Thread, "start", start_and_wait if starting else start):
            try:
                self.node.clone_arena(source, name)
            except KeyboardInterrupt:
                return True
        return False

    def clone_until_told(self, source: str, name: str) -> None:
        """Clone, until the first progress, of which the callback raises."""

        def refuse(_: object) -> None:
            raise LookupError("enough")

        self.node.clone_arena(source, name, progress=refuse)

    def evict(self, name: str) -> dict[str, int]:
        """Have the merger evict an arena."""
        from dataclasses import asdict

        return asdict(self.arenas[name].evict())

    def fetch(
        self, name: str, offset: int = 0, size: int | None = None, timeout: float = 30
    ) -> None:
        """Bring away pages back."""
        self.arenas[name].fetch(offset, size, timeout)

    def fetch_read(self, name: str, offset: int, size: int) -> str:
        """Read by the client's own call; in hex."""
        return self.arenas[name].read(offset, size).hex()

    def read_by_kernel(self, name: str, page: int, pages: int) -> str:
        """Have the kernel read pages, for a system call; in hex."""
        reader, writer = os.pipe()
        data = b""
        for at in range(page, page + pages):
            assert os.write(writer, self.views[name][at * PAGE : (at + 1) * PAGE]) == PAGE
            data += os.read(reader, PAGE)
        os.close(reader)
        os.close(writer)
        return data.hex()

    def lock_memory(self) -> None:
        """Have whatever is mapped from now on filled at once, and never swapped out."""
        import ctypes

        if ctypes.CDLL(None, use_errno=True).mlockall(_MCL_FUTURE) != 0:
            raise OSError(ctypes.get_errno(), "mlockall")

    def reserve(self, pages: int) -> int:
        """Return where so many addresses are that nothing else uses."""
        import ctypes
        import mmap

        self.reserved = mmap.mmap(-1, pages * PAGE)
        return ctypes.addressof(ctypes.c_char.from_buffer(self.reserved))

    def read_at(self, address: int, length: int) -> str:
        """Return bytes at an address in hex."""
        import ctypes

        return ctypes.string_at(address, length).hex()

    def write_at(self, address: int, data: str) -> None:
        """Write bytes given in hex to an address."""
        import ctypes

        raw = bytes.fromhex(data)
        ctypes.memmove(address, raw, len(raw))

    def discard_in_turn(self, name: str, seed: int, rounds: int) -> list[int]:
        """Discard pages while they are merged, restored and written; what was not zero then."""
        view, pages = self.views[name], len(self.views[name]) // PAGE
        original, order, wrong = content(seed, pages), random.Random(seed), []
        for number in range(rounds):
            self.arenas[name].share()
            page, count = order.randrange(pages - 16), order.randrange(1, 16)
            part = slice(page * PAGE, (page + count) * PAGE)
            self.system("madvise", name, page, count, 4)  # MADV_DONTNEED
            if number % 2:
                view[part.start + 1] = 7
            if any(view[part.start + 2 : part.stop]) or view[part.start + 1] != 7 * (number % 2):
                wrong.append(number)
            view[part] = original[part]
        return wrong

    def descriptors(self) -> int:
        """How many file descriptors are open."""
        return len(os.listdir("/proc/self/fd"))

    def identity(self) -> tuple[int, int]:
        """User id, and effective capabilities."""
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith("CapEff"))
        return os.geteuid(), int(line.split()[1], 16)

    def fork(self, name: str) -> dict[str, str]:
        """Fork; the child says what the client tells it, then ends. The parent writes meanwhile."""
        import samepage

        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            told = {}
            for call in ("share", "stats", "unshare", "close"):
                try:
                    getattr(self.arenas[name], call)()
                    told[call] = "nothing"
                except samepage.SamepageError as error:
                    told[call] = type(error).__name__
            with samepage.connect() as node, node.create_arena("of-the-child", PAGE) as arena:
                arena.buffer[0] = 1
                told["new"] = str(arena.stats().private)
            os.write(writer, json.dumps(told).encode())
            os._exit(0)
        os.close(writer)
        self.write(name, 0, "c0ffee")
        with os.fdopen(reader) as pipe:
            answers: dict[str, str] = json.loads(pipe.read())
        _, status = os.waitpid(child, 0)
        answers["status"] = str(status)
        return answers

    def write_beside_a_child(self, name: str, offset: int, data: str) -> None:
        """Write while a forked child lives."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)  # until the parent closes its end
            os._exit(0)
        os.close(reader)
        self.write(name, offset, data)
        os.close(writer)
        os.waitpid(child, 0)


def become(user: int) -> None:
    """Go on as another user without any capability, as a program that was started as that user.

    Only what is loaded already may be in a folder that the user cannot read.
    """
    import ctypes

    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    # the kernel hides /proc/self of a process that changed its user, but not after exec()
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1)


def main() -> None:
    """Serve calls until standard input ends."""
    served: Served | None = None
    for line in sys.stdin:
        call, *args = json.loads(line)
        try:
            served = served or Served()
            answer: dict[str, object] = {"result": getattr(served, call)(*args)}
        except Exception as error:
            answer = {"error": [type(error).__name__, str(error)]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
