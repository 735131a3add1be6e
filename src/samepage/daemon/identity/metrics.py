"""What there is to tell Prometheus of who is who (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric

from samepage.daemon.identity.base import OUTCOMES, Identity
from samepage.daemon.metrics import counter


def collect(identity: Identity) -> Iterable[Metric]:
    """Return what there is to tell now."""
    yield counter(
        "samepage_identity_decisions",
        "Arenas that processes wanted to open in a domain, by what came of it.",
        {outcome: identity.decided[outcome] for outcome in OUTCOMES},
        "outcome",
    )
