"""The webhook's settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from samepage.daemon.addresses import UNIX, check_listen
from samepage.daemon.config import require, setting
from samepage_kubernetes.settings import KubernetesSettings

SECTION = "webhook"

# What Kubernetes takes for a projected token.
_EXPIRATION_MIN = 600
_EXPIRATION_MAX = 1 << 32


@dataclass(frozen=True)
class Config(KubernetesSettings):
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

    def __post_init__(self) -> None:
        check_listen(self.listen)
        require(not self.listen.startswith(UNIX), f"listen must be host:port, not {self.listen}")
        for name in ("socket_dir", "mount_dir", "token_dir"):
            path = getattr(self, name)
            require(path.is_absolute(), f"{name} must be an absolute path, not {path}")
        require(bool(self.token_audience), "token_audience must not be empty")
        require(
            _EXPIRATION_MIN <= self.token_expiration_seconds <= _EXPIRATION_MAX,
            f"token_expiration_seconds must be {_EXPIRATION_MIN} or more",
        )
        self.check_kubernetes()
