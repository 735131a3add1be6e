"""What happens to the cables of `samepage up --netns`: cut, two hosts apart, slow and lossy ones.

A lossy link is a relay of frames between two TAP devices, run as a program of its own, since not
every kernel has netem: `python links.py BRIDGE LINK NAMESPACE DELAY_MS LOSS REORDER SEED`. It takes
the place of the host's own link until its standard input ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import random
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

_TUNSETIFF = 0x400454CA
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_CLONE_NEWNET = 0x40000000
_FRAME_MAX = 65_536
_INTERFACE = "eth0"
_WIRE = "wire0"


def ip(*arguments: str) -> str:
    """Run `ip`; return what it says."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def cut(*links: str) -> Iterator[None]:
    """Pull the cables out, for as long as the context lasts."""
    for link in links:
        ip("link", "set", link, "down")
    try:
        yield
    finally:
        for link in links:
            ip("link", "set", link, "up")


@contextlib.contextmanager
def apart(*links: str) -> Iterator[None]:
    """Keep these hosts from each other; all others reach them as before."""
    _isolate(links, "on")
    try:
        yield
    finally:
        _isolate(links, "off")


@contextlib.contextmanager
def apart_for(seconds: float, *links: str) -> Iterator[None]:
    """Keep these hosts from each other for a while, which ends at the latest with the context."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(apart(*links))
        timer = threading.Timer(seconds, stack.pop_all().close)
        timer.start()
        try:
            yield
        finally:
            timer.join()


def _isolate(links: tuple[str, ...], state: str) -> None:
    for link in links:
        subprocess.run(["bridge", "link", "set", "dev", link, "isolated", state], check=True)


@contextlib.contextmanager
def impaired(
    bridge: str,
    link: str,
    namespace: str,
    *,
    delay_ms: float = 0.0,
    loss: float = 0.0,
    reorder: float = 0.0,
    seed: int = 1,
) -> Iterator[None]:
    """Let each frame of a host's link take `delay_ms`, each way; lose a share of them (0 to 1), and
    let a share overtake the others."""
    numbers = map(str, (delay_ms, loss, reorder, seed))
    relay = subprocess.Popen(
        [sys.executable, __file__, bridge, link, namespace, *numbers],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert relay.stdin is not None
    assert relay.stdout is not None
    try:
        assert relay.stdout.readline() == b"ready\n"
        yield
    finally:
        relay.stdin.close()
        assert relay.wait(20) == 0


class _Relay:
    """Passes frames on, late, and not all of them."""

    def __init__(self, delay_ms: float, loss: float, reorder: float, seed: int) -> None:
        self._delay = delay_ms / 1000
        self._loss = loss
        self._reorder = reorder
        self._random = random.Random(seed)
        self._loop = asyncio.get_running_loop()

    def join(self, one: int, other: int) -> None:
        """Pass on what comes out of either."""
        self._loop.add_reader(one, self._pass, one, other)
        self._loop.add_reader(other, self._pass, other, one)

    def _pass(self, source: int, target: int) -> None:
        frame = os.read(source, _FRAME_MAX)
        if self._random.random() < self._loss:
            return
        delay = 0.0 if self._random.random() < self._reorder else self._delay
        self._loop.call_later(delay, _send, target, frame)


def _send(target: int, frame: bytes) -> None:
    # A device that is going away takes no frames any more; a cable does not mind.
    with contextlib.suppress(OSError):
        os.write(target, frame)


def _tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return fd


async def _relay(arguments: list[str]) -> None:
    bridge, link, namespace, delay_ms, loss, reorder, seed = arguments
    outside = _tap(f"{link}t")
    ip("link", "set", f"{link}t", "master", bridge, "up")
    with Path(f"/run/netns/{namespace}").open() as file:
        ctypes.CDLL(None).setns(file.fileno(), _CLONE_NEWNET)
    inside = _tap(_WIRE)
    interface = json.loads(ip("-j", "address", "show", "dev", _INTERFACE))[0]
    address = next(a for a in interface["addr_info"] if a["family"] == "inet")
    own = f"{address['local']}/{address['prefixlen']}"
    # The same hardware address, so that nobody has to ask anew who has the host's address.
    ip("link", "set", _WIRE, "address", interface["address"])
    _move(own, _INTERFACE, _WIRE)
    _Relay(float(delay_ms), float(loss), float(reorder), int(seed)).join(outside, inside)
    print("ready", flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, ended.set)
    await ended.wait()
    _move(own, _WIRE, _INTERFACE)


def _move(address: str, source: str, target: str) -> None:
    ip("link", "set", source, "down")
    ip("address", "delete", address, "dev", source)
    ip("address", "add", address, "dev", target)
    ip("link", "set", target, "up")


if __name__ == "__main__":
    asyncio.run(_relay(sys.argv[1:]))
