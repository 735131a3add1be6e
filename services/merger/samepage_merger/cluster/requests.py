"""Checks what other mergers ask for."""

from __future__ import annotations

from samepage.daemon.secrets import DOMAIN_ID_BYTES
from samepage.daemon.wire import DIGEST_BYTES
from samepage_merger.cluster.away import Digests
from samepage_merger.cluster.digests import (
    FINGERPRINT_BYTES,
    Fingerprints,
    parse_digests,
    parse_fingerprints,
)


class BadRequestError(Exception):
    """INVALID_ARGUMENT, and why."""


def check_domain(domain_id: bytes) -> None:
    """Check a domain's id.

    Raises:
        BadRequestError: its length is wrong.
    """
    if len(domain_id) != DOMAIN_ID_BYTES:
        raise BadRequestError(f"domain_id has {len(domain_id)} bytes instead of {DOMAIN_ID_BYTES}")


def checked(
    domain_id: bytes, digests: bytes, fingerprints: bytes, most: int
) -> tuple[Digests, Fingerprints]:
    """Return the digests and fingerprints of a request.

    Raises:
        BadRequestError: a length is wrong.
    """
    check_domain(domain_id)
    count, rest = divmod(len(digests), DIGEST_BYTES)
    if rest or not 1 <= count <= most:
        raise BadRequestError(
            f"digests has {len(digests)} bytes: give 1 to {most}, of {DIGEST_BYTES} bytes each"
        )
    if fingerprints and len(fingerprints) != count * FINGERPRINT_BYTES:
        raise BadRequestError(
            f"fingerprints has {len(fingerprints)} bytes: give one of {FINGERPRINT_BYTES} bytes"
            f" for each of the {count} digests, or none at all"
        )
    return parse_digests(digests), parse_fingerprints(fingerprints)
