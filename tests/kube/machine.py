"""The machine under Kubernetes: what a node changes of it, and how that is put back."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

BRIDGE = "spkube"
_BRIDGE_ADDRESS = "02:73:70:00:00:01"

_SETTINGS = (
    "kernel/panic",
    "kernel/panic_on_oops",
    "net/ipv4/conf/all/route_localnet",
    "net/ipv4/ip_forward",
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
_NAMESPACES = Path("/run/netns")
_CABLE = "spkube2"

# What a node changes of the machine, it changes of these.
_APART = """
for directory in /run /dev/shm /var/lib/kubelet /var/log/pods /var/log/containers \
        /usr/libexec/kubernetes; do
    mkdir -p "$directory"
    mount -t tmpfs samepage "$directory"
done
ip link set lo up
echo 1 > /proc/sys/net/ipv4/ip_forward
echo ready
exec cat
"""


def run(
    *arguments: str | Path,
    check: bool = True,
    text: str | None = None,
    environment: dict[str, str] | None = None,
) -> str:
    """Run a program to its end; return what it printed."""
    command = list(map(str, arguments))
    done = subprocess.run(command, capture_output=True, text=True, input=text, env=environment)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Put the kernel's settings, firewall rules and folders back at the end."""
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


@contextlib.contextmanager
def bridge(address: str, name: str = BRIDGE) -> Iterator[None]:
    """A network that joins nodes, with an address of this machine's on it."""
    # Without an address of its own it has that of a port: who talks to it loses it with that port.
    run("ip", "link", "add", name, "address", _BRIDGE_ADDRESS, "type", "bridge")
    try:
        run("ip", "address", "add", f"{address}/24", "dev", name)
        run("ip", "link", "set", name, "up")
        yield
    finally:
        _remove_link(name)


@contextlib.contextmanager
def pod_network(link: str) -> Iterator[None]:
    """At the end, remove what network plugins leave: a bridge, and namespaces."""
    before = set(_namespaces())
    try:
        yield
    finally:
        for name in _namespaces():
            if name not in before and name.startswith("cni-"):
                run("ip", "netns", "delete", name)
        _remove_link(link)


@contextlib.contextmanager
def apart(address: str, pods: str, gateway: str) -> Iterator[tuple[str, ...]]:
    """A network at the bridge, and empty folders where a node writes, for programs that are
    started with what this yields. They last as long as the last of those.

    Args:
        pods: what is routed to the address.
        gateway: the bridge's own address.
    """
    command = ["unshare", "--mount", "--net", "sh", "-ec", _APART]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdin and holder.stdout
        try:
            if holder.stdout.readline() != "ready\n":
                raise RuntimeError("no namespaces for a second node: its shell said why")
            enter = ("nsenter", f"--target={holder.pid}", "--mount", "--net")
            end = ("name", "eth0", "netns", str(holder.pid))
            run("ip", "link", "add", _CABLE, "type", "veth", "peer", *end)
            run("ip", "link", "set", _CABLE, "master", BRIDGE, "up")
            run(*enter, "ip", "address", "add", f"{address}/24", "dev", "eth0")
            run(*enter, "ip", "link", "set", "eth0", "up")
            run(*enter, "ip", "route", "add", "default", "via", gateway)
            run("ip", "route", "add", pods, "via", address)
            yield enter
        finally:
            _remove_link(_CABLE)
            holder.stdin.close()


@contextlib.contextmanager
def cgroup(name: str) -> Iterator[None]:
    """A control group of this name, in each hierarchy that there is."""
    whole = (_CGROUPS / "cgroup.procs").exists()
    hierarchies = [_CGROUPS] if whole else [each.parent for each in _CGROUPS.glob("*/cgroup.procs")]
    groups = [hierarchy.resolve() / name for hierarchy in hierarchies]
    for group in groups:
        group.mkdir(exist_ok=True)
    try:
        yield
    finally:
        for group in groups:
            for directory, _, _ in os.walk(group, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)


def unmount_below(directory: Path) -> None:
    """Unmount everything below a directory, the last mounted first."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in reversed(mounts):
        if mount.startswith(f"{directory}/"):
            run("umount", "--lazy", mount, check=False)


def _namespaces() -> list[str]:
    return os.listdir(_NAMESPACES) if _NAMESPACES.is_dir() else []


def _remove_link(name: str) -> None:
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
