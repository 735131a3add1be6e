"""The settings of `samepage-arenas`."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from samepage.daemon.config import require, setting
from samepage.daemon.settings import DaemonSettings
from samepage.daemon.tls import NetworkSettings
from samepage.rpc import ARENAS_SOCKET
from samepage.sizes import memory_bytes

SECTION = "arenas"


@dataclass(frozen=True)
class Config(NetworkSettings, DaemonSettings):
    """Settings of one host's helper. Raises ConfigError when one makes no sense."""

    node: str = setting(
        "", "This host's name, as logs and status say it. Empty: the machine's host name."
    )
    dir: Path = setting(Path("/run/samepage"), "Directory of the host's sockets.")
    listen: str = setting(
        "127.0.0.1:0",
        "Address of the gRPC API, host:port. Port 0 takes any free one. Whoever reaches it can "
        "read and write every arena that this process holds.",
    )
    api_socket: Path | None = setting(
        None,
        "Unix socket that the API is on too, for this process's own user alone. "
        f"Empty: <dir>/{ARENAS_SOCKET}.",
    )
    hold_limit_bytes: int = setting(
        0,
        "How many bytes the arenas held may have together, touched or not. "
        "0: half of the machine's memory.",
    )
    arenas_max: int = setting(1000, "How many arenas are held at most.")
    streams_max: int = setting(
        32,
        "How many streams may write and read at the same time. Each takes about 5 MiB of memory "
        "on top of the arenas.",
    )
    idle_seconds: float = setting(
        60.0, "How long a stream may stand still for its client before it is ended, in seconds."
    )

    def __post_init__(self) -> None:
        self.check_network([self.listen])
        require(self.hold_limit_bytes >= 0, "hold_limit_bytes must be 0 or more")
        require(self.arenas_max >= 1, "arenas_max must be 1 or more")
        require(self.streams_max >= 1, "streams_max must be 1 or more")
        require(self.idle_seconds > 0, "idle_seconds must be more than 0")
        self.check_daemon()

    @property
    def node_name(self) -> str:
        """The host's name."""
        return self.node or socket.gethostname()

    @property
    def socket_path(self) -> Path:
        """The unix socket of the API."""
        return self.api_socket or self.dir / ARENAS_SOCKET

    @property
    def limit_bytes(self) -> int:
        """How many bytes may be held."""
        return self.hold_limit_bytes or memory_bytes() // 2
