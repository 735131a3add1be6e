"""The scanner's settings."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path

from samepage.daemon.config import require, setting
from samepage.daemon.identity import IdentitySettings
from samepage.daemon.settings import DaemonSettings
from samepage.daemon.tls import NetworkSettings
from samepage_scanner.attention import REST_MAX

SECTION = "scanner"

_SECONDS_MIN = 0.001
_SECONDS_MAX = 86400.0
_RECHECK_SECONDS_MAX = 31_536_000.0
_RUN_PAGES_MAX = 65536
_SAMPLING_BITS_MAX = 16
_NODE = re.compile(r"[A-Za-z0-9._-]{1,253}")


@dataclass(frozen=True)
class Config(NetworkSettings, IdentitySettings, DaemonSettings):
    """Settings of one scanner. Raises ConfigError when one makes no sense."""

    node: str = setting(
        "",
        "This host's name, unique in the cluster: 1 to 253 of A-Z a-z 0-9 . _ -. "
        "Empty: the machine's host name.",
    )
    dir: Path = setting(
        Path("/run/samepage"), "Directory of the host's sockets; the merger's as well."
    )
    listen: str = setting(
        "127.0.0.1:0",
        "Address of the gRPC API, host:port. Port 0 takes any free one. "
        "The API is always on unix:<dir>/scanner-api.sock too, for the operator's user alone.",
    )
    secret_file: Path = setting(
        Path("/etc/samepage/secret"),
        "File with the cluster's secret, the same on every host, at least 16 bytes.",
    )
    merger: str = setting(
        "", "gRPC target of this host's merger. Empty: unix:<dir>/merger-api.sock."
    )
    merger_address: str = setting(
        "",
        "host:port where other hosts reach this host's merger; told to the index. "
        "Empty: they do not reach it.",
    )
    index: str = setting("", "gRPC target of the index, host:port. Empty: no index.")
    interval_seconds: float = setting(
        10.0,
        "Seconds from the beginning of a background pass to the next. A policy, as are the next "
        "ones up to cpu_percent: `samepage policy` changes them while the scanner runs.",
    )
    interval_max_seconds: float = setting(
        120.0, "What the interval may grow to, in seconds, while passes find nothing to do."
    )
    recheck_seconds: float = setting(
        600.0,
        "In how many seconds all pages are looked at anew, a few each pass, of agents that "
        "track writes: for what they cannot tell.",
    )
    rest_passes_max: int = setting(
        64,
        "For how many passes pages that keep changing are left alone at most, 0 to 255. "
        "They are from the second change on, for 2, 4, 8... passes.",
    )
    min_run_pages: int = setting(
        1,
        "Leave runs of equal pages alone that are shorter, 1 to 65536; reports count them as "
        "unique. Each run takes a mapping of the few that a process may have. Zero pages take "
        "none, and are given back always.",
    )
    sampling_bits: int = setting(
        0,
        "Tell the index only of fingerprints whose lowest bits are zero, so many, 0 to 16: of "
        "one in 2, 4, 8...",
    )
    evict_idle_seconds: float = setting(
        0.0,
        "For how many seconds pages must not have been written before they may leave the host "
        "(docs/cluster.md), 0 to 31536000. Those that come back must stand still for twice as "
        "long the next time. 0: none leaves by itself.",
    )
    cpu_percent: float = setting(
        10.0,
        "What background passes may spend, in percent of one core: scanner, agents and merger "
        "together. Shares that an application asks for are not counted.",
    )
    answer_seconds: float = setting(
        5.0,
        "How long an agent has, in seconds, to answer an order to look at pages, and to "
        "answer all of a pass for each 4 GiB of its arenas. One that does not is left out.",
    )
    merger_seconds: float = setting(
        30.0, "How long the merger has, in seconds, to show progress before it counts as away."
    )
    pages_max: int = setting(
        1 << 28,
        "Pages of all arenas that this scanner keeps books of, at 17 bytes each; "
        "an arena beyond is refused. 268435456 pages are 1 TiB.",
    )

    def __post_init__(self) -> None:
        require(
            bool(_NODE.fullmatch(self.node_name)),
            f"node must be 1 to 253 of A-Z a-z 0-9 . _ -, not {self.node_name!r}",
        )
        self.check_network([self.listen], [self.merger, self.index])
        self.check_identity()
        for name in ("answer_seconds", "merger_seconds"):
            require(getattr(self, name) > 0, f"{name} must be more than 0")
        self._check_policy()
        require(0 < self.pages_max <= 1 << 32, "pages_max must be 1 to 4294967296")
        self.check_daemon()

    def _check_policy(self) -> None:
        low, high = self.interval_seconds, self.interval_max_seconds
        require(
            _SECONDS_MIN <= low <= _SECONDS_MAX,
            f"interval_seconds must be {_SECONDS_MIN:g} to {_SECONDS_MAX:g}, not {low:g}",
        )
        require(
            low <= high <= _SECONDS_MAX,
            f"interval_max_seconds must be interval_seconds ({low:g}) to {_SECONDS_MAX:g}, "
            f"not {high:g}",
        )
        require(
            1 <= self.recheck_seconds <= _RECHECK_SECONDS_MAX,
            f"recheck_seconds must be 1 to {_RECHECK_SECONDS_MAX:g}, not {self.recheck_seconds:g}",
        )
        require(
            0 <= self.rest_passes_max <= REST_MAX,
            f"rest_passes_max must be 0 to {REST_MAX}, not {self.rest_passes_max}",
        )
        require(
            1 <= self.min_run_pages <= _RUN_PAGES_MAX,
            f"min_run_pages must be 1 to {_RUN_PAGES_MAX}, not {self.min_run_pages}",
        )
        require(
            0 <= self.evict_idle_seconds <= _RECHECK_SECONDS_MAX,
            f"evict_idle_seconds must be 0 to {_RECHECK_SECONDS_MAX:g}, not"
            f" {self.evict_idle_seconds:g}",
        )
        require(
            0 <= self.sampling_bits <= _SAMPLING_BITS_MAX,
            f"sampling_bits must be 0 to {_SAMPLING_BITS_MAX}, not {self.sampling_bits}",
        )
        require(
            0 < self.cpu_percent <= 100,
            f"cpu_percent must be more than 0 and at most 100, not {self.cpu_percent:g}",
        )

    @property
    def node_name(self) -> str:
        """`node`, or the machine's host name."""
        return self.node or socket.gethostname()

    @property
    def merger_target(self) -> str:
        """`merger`, or the merger's socket in `dir`."""
        return self.merger or f"unix:{self.dir}/merger-api.sock"

    @property
    def addresses(self) -> tuple[str, str]:
        """Where the gRPC API is served."""
        return self.listen, f"unix:{self.dir}/scanner-api.sock"
