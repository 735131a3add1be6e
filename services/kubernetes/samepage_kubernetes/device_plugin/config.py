"""The device plugin's settings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from samepage.daemon.config import require, setting
from samepage_kubernetes.settings import KubernetesSettings

SECTION = "device_plugin"

_RESOURCE = re.compile(r"[a-z0-9.-]{1,253}/[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_COUNT_MAX = 1000


@dataclass(frozen=True)
class Config(KubernetesSettings):
    """Settings of one node's device plugin. Raises ConfigError when one makes no sense."""

    kubelet_dir: Path = setting(
        Path("/var/lib/kubelet/device-plugins"),
        "The kubelet's directory for device plugins, with its kubelet.sock; the plugin's own "
        "socket goes there too.",
    )
    resource: str = setting(
        "samepage.io/userfaultfd", "What a container asks for, in its resource limits."
    )
    device: Path = setting(
        Path("/dev/userfaultfd"), "The device that it gets, under the same path as on the node."
    )
    device_seen: Path | None = setting(
        None,
        "Where this process sees the node's device, when it has a /dev of its own. Empty: at "
        "`device`.",
    )
    count: int = setting(
        8,
        "How many containers of a node may have the device at the same time, 1 to 1000: one a "
        "merger, and one more while it is replaced.",
    )
    check_seconds: float = setting(
        1.0, "How often to look for the device and for a kubelet that restarted, in seconds."
    )

    drain_seconds: float = setting(
        1.0, "How long calls in flight may go on when stopping, in seconds."
    )

    def __post_init__(self) -> None:
        require(
            bool(_RESOURCE.fullmatch(self.resource)),
            f"resource must be a domain, a slash and a name, not {self.resource!r}",
        )
        require(self.device.is_absolute(), f"device must be an absolute path, not {self.device}")
        require(1 <= self.count <= _COUNT_MAX, f"count must be 1 to {_COUNT_MAX}")
        require(self.check_seconds > 0, "check_seconds must be more than 0")
        self.check_kubernetes()

    @property
    def endpoint(self) -> str:
        """The file name of the plugin's socket."""
        return self.resource.replace("/", "-") + ".sock"

    @property
    def seen(self) -> Path:
        """The device, as this process sees it."""
        return self.device_seen or self.device
