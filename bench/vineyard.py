"""Vineyard's migration of an object from one host to another, the peer of a clone.

`python -m bench.vineyard BYTES` runs etcd and two vineyardd on this machine, puts an array of so
many bytes into one, and gets it with `fetch` from the other; then one more whose first tenth is
new. Prints the seconds of both as a JSON list. vineyardd listens on all addresses, so it is run in
a network namespace of its own, with nothing but loopback.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

_WAIT_SECONDS = 30.0
_EQUAL_PART = 0.9


def missing() -> str | None:
    """Return what keeps the peer from being run; None when it is all there."""
    if find_spec("vineyard") is None:
        return "the package vineyard is not installed"
    return None if shutil.which("etcd") else "etcd is not installed (Debian: etcd-server)"


def run(size: int) -> tuple[float, float]:
    """Seconds to migrate an array, and a second one that is 90 % equal to it."""
    command = ["unshare", "--net", sys.executable, "-m", "bench.vineyard", str(size)]
    first, second = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return first, second


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def _process(*command: str | Path, ready: Callable[[], bool]) -> Iterator[None]:
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + _WAIT_SECONDS
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait()


def _accepts(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def _main(size: int) -> None:
    import vineyard
    from vineyard import bdist

    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    program = Path(bdist.__file__).parent / "vineyardd"
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="samepage-bench-")))
        etcd, peer = _free_port(), _free_port()
        url, peer_url = f"http://127.0.0.1:{etcd}", f"http://127.0.0.1:{peer}"
        options = (
            f"--data-dir={place / 'etcd'}",
            f"--listen-client-urls={url}",
            f"--advertise-client-urls={url}",
            f"--listen-peer-urls={peer_url}",
            f"--initial-advertise-peer-urls={peer_url}",
            f"--initial-cluster=default={peer_url}",
        )
        stack.enter_context(_process("etcd", *options, ready=lambda: _accepts(etcd)))
        clients = []
        for number in (1, 2):
            at, port = place / f"{number}.sock", _free_port()
            settings = (
                f"--socket={at}",
                f"--rpc_socket_port={port}",
                f"--size={4 * size}",
                f"--etcd_endpoint={url}",
                "--etcd_prefix=bench",
            )
            ready = at.exists
            stack.enter_context(_process(program, *settings, ready=ready))
            clients.append(vineyard.connect(str(at)))
        print(json.dumps(_migrate(size, *clients)))


def _migrate(size: int, source: Any, destination: Any) -> list[float]:
    array = np.frombuffer(bytearray(os.urandom(size)), np.uint8)
    seconds = []
    for part in (1.0, 1.0 - _EQUAL_PART):
        array[: int(size * part)] = np.frombuffer(os.urandom(int(size * part)), np.uint8)
        name = source.put(array)
        source.persist(name)
        began = time.perf_counter()
        copy = destination.get(name, fetch=True)
        seconds.append(time.perf_counter() - began)
        if not np.array_equal(copy, array):
            raise RuntimeError("Vineyard's copy differs")
    return seconds


if __name__ == "__main__":
    _main(int(sys.argv[1]))
