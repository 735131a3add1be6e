"""The machine under a Kubernetes node: what a node changes of it, and how that is put back."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

_SETTINGS = (
    "kernel/panic",
    "kernel/panic_on_oops",
    "net/ipv4/conf/all/route_localnet",
    "net/ipv4/ip_forward",
    "net/netfilter/nf_conntrack_max",
    "net/netfilter/nf_conntrack_tcp_timeout_close_wait",
    "net/netfilter/nf_conntrack_tcp_timeout_established",
    "vm/overcommit_memory",
)
_DIRECTORIES = (
    "/dev/shm/samepage",
    "/run/samepage",
    "/var/lib/kubelet",
    "/var/log/pods",
    "/var/log/containers",
    "/usr/libexec/kubernetes",
)
_FIREWALLS = ("iptables", "ip6tables")
_CGROUPS = Path("/sys/fs/cgroup")


def run(*arguments: str | Path, check: bool = True, text: str | None = None) -> str:
    """Run a program to its end; return what it printed."""
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, input=text)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Put the kernel's settings, firewall rules, control groups and folders back at the end."""
    values = {name: _read(name) for name in _SETTINGS}
    rules = {program: run(f"{program}-save") for program in _FIREWALLS}
    absent = [directory for directory in map(Path, _DIRECTORIES) if not directory.exists()]
    try:
        yield
    finally:
        for name, value in values.items():
            if value is not None and _read(name) != value:
                Path("/proc/sys", name).write_text(value)
        for program, before in rules.items():
            _restore_firewall(program, before)
        for directory in absent:
            run("rm", "-rf", "--one-file-system", directory)
        _remove_cgroups()


def unmount_below(directory: Path) -> None:
    """Unmount everything below a directory, the last mounted first."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in reversed(mounts):
        if mount.startswith(f"{directory}/"):
            run("umount", "--lazy", mount, check=False)


def remove_namespaces(prefix: str) -> None:
    """Delete the network namespaces whose names begin so."""
    for name in os.listdir("/run/netns") if Path("/run/netns").is_dir() else []:
        if name.startswith(prefix):
            run("ip", "netns", "delete", name)


def remove_link(name: str) -> None:
    """Delete a network interface, if it is there."""
    if Path("/sys/class/net", name).exists():
        run("ip", "link", "delete", name)


def _read(name: str) -> str | None:
    file = Path("/proc/sys", name)
    return file.read_text() if file.exists() else None


def _restore_firewall(program: str, before: str) -> None:
    # A table that was not there is emptied: what is restored names only those that were.
    tables = re.findall(r"^\*(\w+)$", run(f"{program}-save"), re.MULTILINE)
    new = [table for table in tables if f"*{table}\n" not in before]
    run(f"{program}-restore", text=before + "".join(f"*{table}\nCOMMIT\n" for table in new))


def _remove_cgroups() -> None:
    for group in _CGROUPS.rglob("kubepods"):
        for directory, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
