"""A worker of the demo: an application that shares its memory by samepage's public API alone.

It is told what to do by JSON lines on standard input and answers by JSON lines on standard
output; it ends when its input ends.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO

import samepage
from samepage.cli.process import end_with_parent

PAGE_SIZE = 4096
_BATCH_PAGES = 64
_PAUSE_SECONDS = 0.02
_STAMP = struct.Struct("<QQ")
_READ_BYTES = 8 * 2**20


class OwnPages:
    """The worker's own part of the arena: equal to nothing, and written again and again.

    Every page begins with its number and how often it was written, so a lost write shows.
    """

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._body = bytearray(os.urandom(_BATCH_PAGES * PAGE_SIZE))
        self._batches = len(view) // len(self._body)
        self._written = [0] * self._batches
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._rewrite, name="rewrite")
        for batch in range(self._batches):
            self._write(batch)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def cpu_seconds(self) -> float:
        """CPU time that rewriting took so far."""
        if self._thread.ident is None or not self._thread.is_alive():
            return 0.0
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    def intact(self) -> bool:
        """Whether every page holds what was last written to it."""
        with self._lock:
            return all(self._holds(batch) for batch in range(self._batches))

    def _rewrite(self) -> None:
        batch = 0
        while not self._end.wait(_PAUSE_SECONDS):
            with self._lock:
                self._write(batch)
            batch = (batch + 1) % self._batches

    def _write(self, batch: int) -> None:
        self._written[batch] += 1
        self._range(batch)[:] = self._expected(batch)

    def _holds(self, batch: int) -> bool:
        return self._range(batch).tobytes() == self._expected(batch)

    def _range(self, batch: int) -> memoryview:
        size = len(self._body)
        return self._view[batch * size : (batch + 1) * size]

    def _expected(self, batch: int) -> bytearray:
        for page in range(_BATCH_PAGES):
            number = batch * _BATCH_PAGES + page
            _STAMP.pack_into(self._body, page * PAGE_SIZE, number, self._written[batch])
        return self._body


class Worker:
    """One arena: the files, and then the worker's own pages."""

    def __init__(self, arena: samepage.Arena, plan: dict[str, Any]) -> None:
        self._arena = arena
        self._view = arena.buffer
        self._inputs = plan["inputs"]
        self._own = OwnPages(self._view[plan["own_offset"] :])

    def run(self, commands: BinaryIO) -> None:
        """Load, then do as told until the input ends."""
        self._load()
        self._own.start()
        try:
            answer({"answer": "loaded"})
            for line in commands:
                command = json.loads(line)
                answer({"answer": command["do"], **self._do(command)})
        finally:
            self._own.stop()

    def _do(self, command: dict[str, Any]) -> dict[str, Any]:
        actions: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "share": self._share,
            "stats": self._stats,
            "write": self._write,
            "check": self._check,
        }
        return actions[command["do"]](command)

    def _load(self) -> None:
        for file in self._inputs:
            begin, left = file["offset"], file["size"]
            with open(file["path"], "rb", buffering=0) as source:
                while left:
                    step = min(left, _READ_BYTES)
                    got = source.readinto(self._view[begin : begin + step])
                    if not got:
                        raise OSError(f"{file['path']} became shorter while it was loaded")
                    begin, left = begin + got, left - got
                    answer({"loaded_bytes": got})

    def _share(self, command: dict[str, Any]) -> dict[str, Any]:
        report = self._arena.share(timeout=command["timeout"])
        return {"report": dataclasses.asdict(report)}

    def _stats(self, _: dict[str, Any]) -> dict[str, Any]:
        cpu = time.process_time() - self._own.cpu_seconds()
        return {"stats": dataclasses.asdict(self._arena.stats()), "cpu_seconds": cpu}

    def _write(self, command: dict[str, Any]) -> dict[str, Any]:
        change = command["change"].encode()
        for page in range(command["pages"]):
            start = command["offset"] + page * PAGE_SIZE
            self._view[start : start + len(change)] = change
        return {}

    def _check(self, _: dict[str, Any]) -> dict[str, Any]:
        digests = [
            hashlib.sha256(self._view[file["offset"] : file["offset"] + file["size"]]).hexdigest()
            for file in self._inputs
        ]
        return {"digests": digests, "own_intact": self._own.intact()}


def answer(message: dict[str, Any]) -> None:
    """Tell the demo."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Work as the first line of standard input says; end with the process in the argument."""
    end_with_parent(int(sys.argv[1]))
    plan = json.loads(sys.stdin.buffer.readline())
    try:
        with (
            samepage.connect(plan["dir"]) as node,
            node.create_arena(plan["name"], size=plan["size"]) as arena,
        ):
            Worker(arena, plan).run(sys.stdin.buffer)
    except (samepage.SamepageError, OSError) as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)


if __name__ == "__main__":
    main()
