"""The webhook's settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from samepage.daemon.addresses import UNIX, check_listen
from samepage.daemon.config import require, setting
from samepage.daemon.logs import check_level
from samepage.daemon.metrics import check_metrics_listen

SECTION = "webhook"

# What Kubernetes takes for a projected token.
_EXPIRATION_MIN = 600
_EXPIRATION_MAX = 1 << 32


@dataclass(frozen=True)
class Config:
    """Settings of the webhook. Raises ConfigError when one makes no sense."""

    listen: str = setting(
        "0.0.0.0:8443",
        "Address of the webhook (HTTPS), host:port, for the API server: reviews are at /inject. "
        "Port 0 takes any free one.",
    )
    tls_cert_file: Path = setting(
        Path("/etc/samepage/tls/tls.crt"),
        "File with the webhook's certificate (PEM), for the name of its Service, "
        "<service>.<namespace>.svc. May change at any time.",
    )
    tls_key_file: Path = setting(
        Path("/etc/samepage/tls/tls.key"), "File with the key of tls_cert_file (PEM)."
    )
    socket_dir: Path = setting(
        Path("/run/samepage"),
        "The nodes' directory of the daemons' sockets.",
    )
    mount_dir: Path = setting(Path("/run/samepage"), "Where pods see that directory; read-only.")
    token: bool = setting(
        True, 'Whether pods get a token: where the daemons have identity = "token".'
    )
    token_dir: Path = setting(
        Path("/var/run/secrets/samepage.io"), "Directory of the token in the pods."
    )
    token_audience: str = setting("samepage", "What the token is for; as the daemons have it.")
    token_expiration_seconds: int = setting(
        3600, "How long a token is good, in seconds, at least 600. The kubelet renews it before."
    )
    health_listen: str = setting(
        "127.0.0.1:0",
        "Address of the health service (gRPC), host:port. Port 0 takes any free one.",
    )
    metrics_listen: str = setting(
        "",
        "Address of Prometheus metrics over HTTP, host:port, at /metrics. Port 0 takes any free "
        "one. Empty: none.",
    )
    log_level: str = setting("info", "Lowest level logged: debug, info, warning or error.")
    drain_seconds: float = setting(5.0, "How long calls in flight may go on when stopping.")
    ready_file: Path | None = setting(
        None, "File that gets the service's addresses as JSON once it serves. Empty: none."
    )

    def __post_init__(self) -> None:
        for address in (self.listen, self.health_listen):
            check_listen(address)
        require(not self.listen.startswith(UNIX), f"listen must be host:port, not {self.listen}")
        for name in ("socket_dir", "mount_dir", "token_dir"):
            path = getattr(self, name)
            require(path.is_absolute(), f"{name} must be an absolute path, not {path}")
        require(bool(self.token_audience), "token_audience must not be empty")
        require(
            _EXPIRATION_MIN <= self.token_expiration_seconds <= _EXPIRATION_MAX,
            f"token_expiration_seconds must be {_EXPIRATION_MIN} or more",
        )
        require(self.drain_seconds >= 0, "drain_seconds must be 0 or more")
        check_metrics_listen(self.metrics_listen)
        check_level(self.log_level)
