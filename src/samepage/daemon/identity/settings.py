"""The settings of who is who, for the merger and the scanner."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from samepage.daemon.config import require, setting
from samepage.daemon.identity.base import Identity, SocketIdentity
from samepage.daemon.identity.policy import Policy
from samepage.daemon.identity.users import UserIdentity

_WAYS = ("socket", "uid", "token")
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True)
class IdentitySettings:
    """Give the merger and the scanner of a host the same."""

    identity: str = setting(
        "socket",
        "Where a process's domain comes from. socket: it names one itself, so whoever reaches the "
        "socket is trusted. uid: from its user and groups, by identity_policy_file. token: from "
        "the Kubernetes service-account token that it shows. The merger and the scanner of a host "
        "must have the same. docs/identity.md has more.",
    )
    identity_policy_file: Path | None = setting(
        None,
        "File (TOML) that says who may use which domains; may change at any time. Empty: with "
        "token, each namespace has the domain of its name; with uid it must be there.",
    )
    token_audience: str = setting(
        "samepage", "What a token must be for: the audience of the projected volume it is from."
    )
    token_node: str = setting(
        "",
        "This host's name as Kubernetes has it: tokens of pods on other nodes are refused. "
        "Empty: not checked.",
    )
    token_api: str = setting(
        "",
        "Where the Kubernetes API server is, https://host:port. Empty: where pods find it, by "
        "KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT.",
    )
    token_api_ca_file: Path = setting(
        _ACCOUNT / "ca.crt", "File with the certificates of those who sign the API server's."
    )
    token_api_token_file: Path = setting(
        _ACCOUNT / "token",
        "File with this daemon's own token, whose account must be allowed to make TokenReviews "
        "(the cluster role system:auth-delegator). May change at any time.",
    )
    token_cache_seconds: float = setting(
        60.0,
        "How long the API server's word on a token counts, in seconds, 0 to 600. Connections "
        "that stand are not asked again.",
    )

    def check_identity(self) -> None:
        """Check these settings.

        Raises:
            ConfigError: one makes no sense.
        """
        require(
            self.identity in _WAYS,
            f"identity must be one of {', '.join(_WAYS)}, not {self.identity!r}",
        )
        require(
            self.identity != "uid" or self.identity_policy_file is not None,
            "identity is uid, so identity_policy_file must say who may use which domains",
        )
        require(
            self.identity != "socket" or self.identity_policy_file is None,
            "identity_policy_file is set but identity is socket: set it to uid or token",
        )
        require(bool(self.token_audience), "token_audience must not be empty")
        require(
            not self.token_api or self.token_api.startswith("https://"),
            f"token_api must begin with https://, not be {self.token_api!r}",
        )
        require(0 <= self.token_cache_seconds <= 600, "token_cache_seconds must be 0 to 600")


def make_identity(settings: IdentitySettings) -> Identity:
    """What the settings say.

    Raises:
        ConfigError: a file cannot be read, or makes no sense.
    """
    if settings.identity == "socket":
        return SocketIdentity()
    policy = Policy(settings.identity_policy_file, settings.identity == "token")
    if settings.identity == "uid":
        return UserIdentity(policy)
    # Only here, so that nobody else needs an HTTP client.
    from samepage.daemon.identity.reviews import Reviewer
    from samepage.daemon.identity.tokens import TokenIdentity

    reviewer = Reviewer(
        settings.token_api,
        settings.token_api_ca_file,
        settings.token_api_token_file,
        settings.token_audience,
    )
    return TokenIdentity(policy, reviewer, settings.token_node, settings.token_cache_seconds)
