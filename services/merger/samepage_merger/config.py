"""The merger's settings."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path

from samepage.daemon.addresses import UNIX
from samepage.daemon.config import require, setting
from samepage.daemon.identity import IdentitySettings
from samepage.daemon.settings import DaemonSettings
from samepage.daemon.tls import NetworkSettings

SECTION = "merger"
#: How many other hosts may hold pages for this one at a time.
HOSTS_MAX = 64

_VMAS_MIN = 16
_VMAS_MAX = 1 << 30
_SHARERS_MIN = 2
_SHARERS_MAX = 1 << 30
_NODE = re.compile(r"[A-Za-z0-9._-]{1,253}")


@dataclass(frozen=True)
class Config(NetworkSettings, IdentitySettings, DaemonSettings):
    """Settings of one merger. Raises ConfigError when one makes no sense."""

    node: str = setting(
        "",
        "This host's name, unique in the cluster: 1 to 253 of A-Z a-z 0-9 . _ -. "
        "Empty: the machine's host name.",
    )
    dir: Path = setting(
        Path("/run/samepage"), "Directory of the host's sockets; the scanner's as well."
    )
    listen: str = setting(
        "127.0.0.1:0",
        "Address of the gRPC API, host:port. Port 0 takes any free one. "
        "The API is always on unix:<dir>/merger-api.sock too, for the operator's user alone.",
    )
    data_listen: str = setting(
        "",
        "Address at which other mergers fetch pages without gRPC around them, host:port. Those who "
        "cannot reach it fetch them at `listen`, at a third of the speed. Empty: the host of "
        "`listen`, at any free port.",
    )
    secret_file: Path = setting(
        Path("/etc/samepage/secret"),
        "File with the cluster's secret, the same on every host, at least 16 bytes.",
    )
    index: str = setting(
        "", "gRPC target of the index, host:port, which knows other hosts. Empty: no other hosts."
    )
    scanner: str = setting(
        "", "gRPC target of this host's scanner. Empty: unix:<dir>/scanner-api.sock."
    )
    store_dir: Path | None = setting(
        None,
        "Directory on a tmpfs for the shared pages, this merger's alone; made if missing. "
        "Empty: /dev/shm/samepage-<node>.",
    )
    store_readonly_dir: Path | None = setting(
        None,
        "A second, read-only mount of store_dir, through which agents get their descriptors. "
        "Empty: the merger makes one that no path leads to, which takes CAP_SYS_ADMIN.",
    )
    store_limit_bytes: int = setting(
        0, "How many bytes of shared pages all domains may have together. 0: half of the tmpfs."
    )
    headroom_percent: float = setting(
        25.0,
        "What share of the bytes that merging saves must fit into the memory that the host has "
        "left, in percent, 0 to 100: merges beyond are refused, since undoing them in a burst of "
        "writes might end in processes being killed. A policy, as are store_limit_bytes and the "
        "next two: `samepage policy` changes them while the merger runs.",
    )
    memory_ceiling_bytes: int = setting(
        0,
        "How many bytes of memory undone merges may count on at most. 0: all that the host has "
        "left, within the limits of the merger's own control group.",
    )
    vma_budget: int = setting(
        0,
        "Of how many mappings (VMAs) sharing may make an arena up, 16 to 1073741824; when they "
        "are used up, the longest runs of equal pages keep them. 0: a quarter of "
        "vm.max_map_count.",
    )
    sharers_max: int = setting(
        0,
        "How many pages may map one slot, 2 to 1073741824: those beyond go on in another slot with "
        "the same bytes, as with KSM's max_page_sharing. 0: any number. A policy.",
    )
    order_timeout_seconds: float = setting(
        5.0,
        "How long an agent has to answer an order, in seconds. The pages of one that does not "
        "are left as they are, and the others go on.",
    )
    min_holders: int = setting(
        2,
        "How many other live hosts must hold a page under a lease before it may leave this host's "
        "memory for being there, 1 to 64. A policy. With fewer, it goes to the spill file, if "
        "there is one, or stays.",
    )
    hold_lease_seconds: float = setting(
        3600.0,
        "How long other hosts hold pages for this one unless it renews that, in seconds, 10 or "
        "more; it does so three times in that time. This host's merger may be away for so long.",
    )
    spill_dir: Path | None = setting(
        None,
        "Directory on a disk for evicted pages that not enough other hosts hold, this merger's "
        "alone; made if missing. What applications have in memory is there in the clear. Empty: "
        "nothing is spilled.",
    )
    spill_limit_bytes: int = setting(
        8 << 30, "How many bytes the spill files may take, of all domains together. A policy."
    )
    lost_seconds: float = setting(
        30.0,
        "For how long everybody who might have the bytes of an away page must say that he has "
        "not, in seconds, before whoever touches it gets an error instead of waiting.",
    )

    def __post_init__(self) -> None:
        require(
            bool(_NODE.fullmatch(self.node_name)),
            f"node must be 1 to 253 of A-Z a-z 0-9 . _ -, not {self.node_name!r}",
        )
        self.check_network(
            [self.listen, *filter(None, [self.data_address])], [self.index, self.scanner]
        )
        self.check_identity()
        require(self.store_limit_bytes >= 0, "store_limit_bytes must be 0 or more")
        require(
            0 <= self.headroom_percent <= 100,
            f"headroom_percent must be 0 to 100, not {self.headroom_percent:g}",
        )
        require(self.memory_ceiling_bytes >= 0, "memory_ceiling_bytes must be 0 or more")
        require(
            self.vma_budget == 0 or _VMAS_MIN <= self.vma_budget <= _VMAS_MAX,
            f"vma_budget must be 0, or {_VMAS_MIN} to {_VMAS_MAX}, not {self.vma_budget}",
        )
        require(
            self.sharers_max == 0 or _SHARERS_MIN <= self.sharers_max <= _SHARERS_MAX,
            f"sharers_max must be 0, or {_SHARERS_MIN} to {_SHARERS_MAX}, not {self.sharers_max}",
        )
        require(
            1 <= self.min_holders <= HOSTS_MAX,
            f"min_holders must be 1 to {HOSTS_MAX}, not {self.min_holders}",
        )
        require(10 <= self.hold_lease_seconds <= 86400, "hold_lease_seconds must be 10 to 86400")
        require(self.spill_limit_bytes >= 0, "spill_limit_bytes must be 0 or more")
        require(self.lost_seconds >= 0, "lost_seconds must be 0 or more")
        require(self.order_timeout_seconds > 0, "order_timeout_seconds must be more than 0")
        self.check_daemon()

    @property
    def node_name(self) -> str:
        """The host's name."""
        return self.node or socket.gethostname()

    @property
    def data_address(self) -> str:
        """`data_listen`, or its default. Empty where `listen` is a unix socket."""
        at_any_port = "" if self.listen.startswith(UNIX) else self.listen.rpartition(":")[0] + ":0"
        return self.data_listen or at_any_port

    @property
    def scanner_target(self) -> str:
        """`scanner`, or the scanner's socket in `dir`."""
        return self.scanner or f"unix:{self.dir}/scanner-api.sock"

    @property
    def store_path(self) -> Path:
        """Where the store is."""
        return self.store_dir or Path(f"/dev/shm/samepage-{self.node_name}")
