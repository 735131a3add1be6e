"""The index's settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from samepage.daemon.config import require, setting
from samepage.daemon.settings import DaemonSettings
from samepage.daemon.tls import NetworkSettings

SECTION = "index"
LEASE_SECONDS_MIN = 0.1
LEASE_SECONDS_MAX = 3600.0


@dataclass(frozen=True)
class IndexConfig(NetworkSettings, DaemonSettings):
    """See the help of each setting, or deploy/config/index.toml."""

    listen: str = setting(
        "127.0.0.1:7171",
        "Addresses to serve on, separated by commas: host:port (port 0: any free one) or "
        "unix:/path.",
    )
    redis_url: str = setting(
        "",
        "Where Redis 7 or newer, or Valkey, is: redis://[user:password@]host:port[/database], "
        "rediss://... for TLS, or unix:///path; any node of a Redis Cluster. Empty: a server of "
        "the index's own, in memory, that ends with it.",
        secret=True,
    )
    redis_password_file: Path | None = setting(
        None, "File with the password for redis_url, when the URL does not hold one."
    )
    redis_ca_file: Path | None = setting(
        None,
        "File with the certificates of those who sign Redis's, for rediss://. Empty: the system's.",
    )
    redis_cert_file: Path | None = setting(
        None, "File with the index's own certificate, when Redis wants one. Empty: none."
    )
    redis_key_file: Path | None = setting(
        None, "File with the key of redis_cert_file. Empty: it is in redis_cert_file."
    )
    redis_timeout_seconds: float = setting(
        10.0, "How long Redis may take to connect or to answer. Seconds."
    )
    key_prefix: str = setting("samepage", "What the names of all keys in Redis begin with.")
    data_dir: Path | None = setting(
        None,
        "Directory for the socket and the log of the index's own server, when redis_url is empty. "
        "Empty: a temporary one.",
    )
    lease_seconds: float = setting(
        15.0, "How long a host counts after its scanner was last heard. Seconds, 0.1 to 3600."
    )
    sweep_seconds: float = setting(
        30.0,
        "How long after its lease a host's entries are kept, in case that it comes back; then "
        "they are deleted. Seconds, at least redis_timeout_seconds.",
    )

    drain_seconds: float = setting(
        10.0, "How long calls in flight may go on when stopping, in seconds."
    )

    def __post_init__(self) -> None:
        self.check_network(self.addresses)
        self.check_daemon()
        require(
            LEASE_SECONDS_MIN <= self.lease_seconds <= LEASE_SECONDS_MAX,
            f"lease_seconds must be {LEASE_SECONDS_MIN} to {LEASE_SECONDS_MAX:.0f}, "
            f"not {self.lease_seconds}",
        )
        require(self.redis_timeout_seconds > 0, "redis_timeout_seconds must be more than 0")
        # A batch that Redis still holds back must not be applied after its host was swept.
        require(
            self.sweep_seconds >= self.redis_timeout_seconds,
            f"sweep_seconds must be at least redis_timeout_seconds, {self.redis_timeout_seconds}",
        )
        require(
            bool(self.key_prefix) and not set("{}") & set(self.key_prefix),
            "key_prefix must not be empty, nor hold braces",
        )
        require(
            self.redis_password_file is None or bool(self.redis_url),
            "redis_password_file is set but redis_url is not: say which Redis it is for",
        )
        for name in ("redis_ca_file", "redis_cert_file", "redis_key_file"):
            file = getattr(self, name)
            require(
                file is None or self.redis_url.startswith("rediss://"),
                f"{name} is set but redis_url does not begin with rediss://",
            )
            require(file is None or file.is_file(), f"{name} {file} is no file")
        require(
            self.redis_key_file is None or self.redis_cert_file is not None,
            "redis_key_file is set but redis_cert_file is not: say which certificate it is of",
        )
        require(
            self.data_dir is None or not self.redis_url,
            "data_dir is for the index's own server: leave it out, or redis_url",
        )

    @property
    def addresses(self) -> list[str]:
        """`listen`, split."""
        return [address.strip() for address in self.listen.split(",")]

    @property
    def lease_ms(self) -> int:
        """The lease in milliseconds."""
        return round(self.lease_seconds * 1000)

    @property
    def sweep_ms(self) -> int:
        """How long entries outlive the lease, in milliseconds."""
        return round(self.sweep_seconds * 1000)
