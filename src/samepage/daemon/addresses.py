"""Addresses that daemons serve on and connect to: "host:port" or "unix:/path"."""

from __future__ import annotations

import ipaddress

from samepage.daemon.config import ConfigError

UNIX = "unix:"


def check_listen(address: str) -> str:
    """The address itself when it is "host:port" or "unix:/path".

    Raises:
        ConfigError: it is neither.
    """
    host, colon, port = address.rpartition(":")
    is_tcp = bool(host and colon) and port.isascii() and port.isdigit() and int(port) < 65536
    if address.startswith(UNIX):
        if len(address) > len(UNIX):
            return address
    elif is_tcp:
        return address
    raise ConfigError(f"cannot listen on {address!r}: give host:port (port 0: any) or unix:/path")


def host_and_port(address: str) -> tuple[str, str]:
    """Return the two sides of "host:port", an IPv6 address without its brackets."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), port


def is_local(address: str) -> bool:
    """Whether nobody but this machine is at the other end: a unix socket, or a loopback address.

    Names are not looked up: of those only "localhost" is local.
    """
    if address.startswith(UNIX):
        return True
    host, _ = host_and_port(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
