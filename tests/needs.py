"""What tests need of the machine, probed independently of the code under test.

A test says `@pytest.mark.needs("move", "io_uring")`, or calls `pytest.skip(reason("io_uring"))`.
With SAMEPAGE_NO_SKIPS=1 a skip is a failure, unless the kernel truly lacks the feature. Run as a
program, this says what the kernel lacks, and fails when that is nothing: a skip has no excuse then.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_USERFAULTFD_IOC_NEW = 0xAA00
_UFFDIO_API = 0xC018AA3F
_UFFD_API = 0xAA
_SYS_IO_URING_SETUP = 425
_IO_URING_PARAMS_BYTES = 120


@dataclass(frozen=True)
class Need:
    """A feature; `kernel`: the kernel may lack it, else a machine that lacks it is set up wrong."""

    present: Callable[[], bool]
    kernel: bool
    lacking: str


@functools.cache
def userfaultfd_features() -> int:
    """Feature bits of struct uffdio_api, 0 when this process gets no userfaultfd."""
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        descriptor = fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, os.O_CLOEXEC)
    finally:
        os.close(device)
    try:
        answer = fcntl.ioctl(descriptor, _UFFDIO_API, struct.pack("=QQQ", _UFFD_API, 0, 0))
    finally:
        os.close(descriptor)
    features: int = struct.unpack("=QQQ", answer)[1]
    return features


def _userfaultfd(*bits: int) -> Callable[[], bool]:
    return lambda: all(userfaultfd_features() & (1 << bit) for bit in bits)


@functools.cache
def _io_uring() -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    params = ctypes.create_string_buffer(_IO_URING_PARAMS_BYTES)
    descriptor = libc.syscall(ctypes.c_long(_SYS_IO_URING_SETUP), ctypes.c_uint(1), params)
    if descriptor < 0:
        return False
    os.close(descriptor)
    return True


def go() -> str | None:
    """Return where Go's command is, where its makers put it at the latest."""
    return shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")


def _installed(*place: str) -> Callable[[], bool]:
    """Whether make installed a program here, next to this Python."""
    return Path(sys.prefix, *place).exists


def _thp() -> bool:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return enabled.exists() and "[never]" not in enabled.read_text()


def _netns() -> bool:
    kinds = Path("/proc/self/ns/net").exists() and shutil.which("ip") and shutil.which("nsenter")
    return bool(kinds) and Path("/dev/net/tun").exists()


def _root() -> bool:
    return os.geteuid() == 0


NEEDS = {
    "userfaultfd": Need(
        lambda: userfaultfd_features() != 0, True, "no /dev/userfaultfd (Linux 6.1)"
    ),
    "move": Need(_userfaultfd(16), True, "no UFFDIO_MOVE (Linux 6.8)"),
    "wp_tmpfs": Need(_userfaultfd(12), True, "no write-protect faults on tmpfs (Linux 5.19)"),
    "remap": Need(_userfaultfd(2), True, "no remap events of userfaultfd"),
    "poison": Need(_userfaultfd(14), True, "no UFFDIO_POISON (Linux 6.6)"),
    "pagemap_scan": Need(_userfaultfd(15), True, "no PAGEMAP_SCAN with WP_ASYNC (Linux 6.7)"),
    "tracking": Need(_userfaultfd(15), True, "no write-protect-async faults (Linux 6.7)"),
    "discard": Need(_userfaultfd(10), True, "no minor faults on tmpfs (Linux 5.14)"),
    "away": Need(
        _userfaultfd(2, 10, 12, 14, 16), True, "no UFFDIO_MOVE or UFFDIO_POISON (Linux 6.8)"
    ),
    "io_uring": Need(_io_uring, True, "no io_uring"),
    "ksm": Need(Path("/sys/kernel/mm/ksm/run").exists, True, "no kernel samepage merging"),
    "thp": Need(_thp, True, "no transparent huge pages"),
    "netns": Need(_netns, True, "no network namespaces, iproute2, or TAP devices"),
    "root": Need(_root, False, "not run as root"),
    "redis": Need(lambda: shutil.which("redis-server") is not None, False, "no redis-server"),
    "go": Need(lambda: go() is not None, False, "no Go"),
    "buildah": Need(
        lambda: all(map(shutil.which, ("buildah", "mmdebstrap"))), False, "no buildah, mmdebstrap"
    ),
    "podman": Need(lambda: all(map(shutil.which, ("podman", "runc"))), False, "no podman, runc"),
    "chart_tools": Need(_installed("go", "bin", "helm"), False, "no helm (make test builds it)"),
    "checkov": Need(
        _installed("checkov", "bin", "checkov"), False, "no checkov (make test has it)"
    ),
    "gcc": Need(lambda: shutil.which("gcc") is not None, False, "no gcc"),
}


def reason(feature: str) -> str:
    """Return the text to skip with."""
    return f"needs {feature}: {NEEDS[feature].lacking}"


def missing(*features: str) -> str | None:
    """Return why a test that needs these features cannot run, None when it can."""
    return next((reason(name) for name in features if not NEEDS[name].present()), None)


def excused(text: str) -> bool:
    """Whether a skip with this reason is the kernel's doing, which only root can tell."""
    found = re.search(r"needs ([a-z_]+):", text)
    need = NEEDS.get(found[1]) if found else None
    return need is not None and need.kernel and not need.present() and _root()


def main() -> None:
    """Say what the kernel lacks; exit with 1 when it lacks nothing that tests need."""
    lacking = [reason(name) for name, need in NEEDS.items() if need.kernel and not need.present()]
    if not lacking or not _root():
        sys.exit("a test was skipped that this kernel can run")
    print("\n".join(lacking))


if __name__ == "__main__":
    main()
