"""Network namespaces that stand for hosts: one a host, joined by a bridge, as cables join machines.

Each host has an address of its own in 198.18.0.0/15, the range that is set aside for tests of
networks (RFC 2544), and a link that can be cut, slowed or made lossy like any other. The bridge has
an address too, so that this machine reaches them all. Everything is named after the cluster's
directory, and gone when the context ends; what a killed one left is removed by the next.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from samepage.errors import InvalidArgumentError, UnsupportedKernelError

HOSTS_MAX = 200
_NETWORK = ipaddress.IPv4Network("198.18.0.0/15")
_FIRST_HOST = 10
_INTERFACE = "eth0"


class Network:
    """The namespaces of some hosts, for as long as the context lasts.

    Args:
        directory: what everything is named after.
        hosts: their names, at most HOSTS_MAX.

    Raises on entering:
        UnsupportedKernelError: this process may not make namespaces, or `ip` is missing.
    """

    def __init__(self, directory: Path, hosts: Sequence[str]) -> None:
        if len(hosts) > HOSTS_MAX:
            raise InvalidArgumentError(f"{len(hosts)} hosts: a network has at most {HOSTS_MAX}")
        place = hashlib.blake2b(os.fsencode(directory.absolute()), digest_size=4).hexdigest()
        self.bridge = f"sp{place}"
        self._hosts = tuple(hosts)
        self._subnet = next(_NETWORK.subnets(new_prefix=24))

    def namespace(self, host: str) -> str:
        """The name of a host's namespace, as `ip netns` knows it."""
        return f"{self.bridge}-{host}"

    def link(self, host: str) -> str:
        """The bridge's end of the host's link."""
        return f"{self.bridge}.{self._hosts.index(host)}"

    def address(self, host: str) -> str:
        """The host's address, without a port."""
        return str(self._subnet[_FIRST_HOST + self._hosts.index(host)])

    def command(self, host: str, *arguments: str) -> list[str]:
        """Return the command that runs another one on a host."""
        return [*_enter(self.namespace(host)), *arguments]

    def __enter__(self) -> Self:
        if shutil.which("ip") is None or shutil.which("nsenter") is None:
            raise UnsupportedKernelError(
                "network namespaces need the commands ip and nsenter: install iproute2 and"
                " util-linux, or leave out --netns"
            )
        self._remove()
        self._subnet = _free_subnet()
        try:
            self._make()
        except _IpError as error:
            self._remove()
            raise UnsupportedKernelError(
                f"cannot make network namespaces ({error}): run as root on a kernel that has"
                " network namespaces, bridges and veth, or leave out --netns"
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()

    def _make(self) -> None:
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("address", "add", f"{self._subnet[1]}/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")
        for host in self._hosts:
            namespace, link = self.namespace(host), self.link(host)
            _ip("netns", "add", namespace)
            peer = ("peer", "name", _INTERFACE, "netns", namespace)
            _ip("link", "add", link, "type", "veth", *peer)
            _ip("link", "set", link, "master", self.bridge, "up")
            _ip("-n", namespace, "link", "set", "lo", "up")
            _ip("-n", namespace, "address", "add", f"{self.address(host)}/24", "dev", _INTERFACE)
            _ip("-n", namespace, "link", "set", _INTERFACE, "up")

    def _remove(self) -> None:
        # Links first: a namespace takes its end with it, but only some time after its name.
        for name in _names("/sys/class/net"):
            if name == self.bridge or name.startswith(f"{self.bridge}."):
                _ip("link", "delete", name)
        for name in _names("/run/netns"):
            if name.startswith(f"{self.bridge}-"):
                _ip("netns", "delete", name)


class _IpError(Exception):
    """`ip` failed; the text is its own."""


def _enter(namespace: str) -> list[str]:
    return ["nsenter", f"--net=/run/netns/{namespace}", "--"]


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise _IpError(done.stderr.strip() or f"ip {' '.join(arguments)} failed")
    return done.stdout


def _names(directory: str) -> list[str]:
    return os.listdir(directory) if os.path.isdir(directory) else []


def _free_subnet() -> ipaddress.IPv4Network:
    used = {
        ipaddress.IPv4Address(address["local"])
        for interface in json.loads(_ip("-j", "-4", "address", "show") or "[]")
        for address in interface.get("addr_info", ())
    }
    for subnet in _NETWORK.subnets(new_prefix=24):
        if not any(address in subnet for address in used):
            return subnet
    raise UnsupportedKernelError(f"every network of {_NETWORK} is in use on this machine")
