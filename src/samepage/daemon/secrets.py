"""What is derived from the cluster's secret, and which names are valid.

Everything that belongs to a domain is a keyed hash of its name under the cluster's secret: who
lacks the secret can neither predict a fingerprint nor recognise a domain in the index.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from pathlib import Path

from samepage.daemon.config import ConfigError
from samepage.errors import InvalidArgumentError

SECRET_BYTES_MIN = 16
DOMAIN_ID_BYTES = 16
DIGEST_KEY_BYTES = 32
NAME_BYTES_MAX = 127
DOMAIN_CHARACTERS_MAX = 63

_SEED_BYTES = 8
_DOMAIN = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


def read_secret(path: Path) -> bytes:
    """The cluster's secret from a file, without line ends at its end.

    Raises:
        ConfigError: the file cannot be read, or holds fewer than 16 bytes.
    """
    try:
        secret = path.read_bytes().rstrip(b"\r\n")
    except OSError as error:
        raise ConfigError(f"cannot read the secret file {path}: {error.strerror}") from error
    if len(secret) < SECRET_BYTES_MIN:
        raise ConfigError(
            f"the secret in {path} has {len(secret)} bytes and needs {SECRET_BYTES_MIN} or more: "
            f"make one with `head -c 32 /dev/urandom | base64 > {path}`"
        )
    return secret


def domain_seed(secret: bytes, domain: str) -> int:
    """The 64-bit seed of the domain's fingerprints."""
    return int.from_bytes(_derive(secret, b"seed", domain, _SEED_BYTES), "little")


def domain_id(secret: bytes, domain: str) -> bytes:
    """The 16 bytes by which the index knows the domain."""
    return _derive(secret, b"id", domain, DOMAIN_ID_BYTES)


def digest_key(secret: bytes, domain_id: bytes) -> bytes:
    """The key of the domain's digests; a store's domain is known by its id before its name is."""
    return _keyed_hash(secret, b"digest", domain_id, DIGEST_KEY_BYTES)


def check_domain(domain: str) -> str:
    """The domain itself when it is valid: 1 to 63 of `a-z 0-9 - .`, no `-` or `.` at an end.

    Raises:
        InvalidArgumentError: it is not.
    """
    if len(domain) > DOMAIN_CHARACTERS_MAX or not _DOMAIN.fullmatch(domain):
        raise InvalidArgumentError(
            f"the domain {_shown(domain)} is not valid: use 1 to {DOMAIN_CHARACTERS_MAX} "
            "characters of a-z, 0-9, '-' and '.', with a letter or digit at both ends"
        )
    return domain


def check_name(name: str) -> str:
    """The arena name itself when it is valid: 1 to 127 bytes of UTF-8, no `/`, no control
    characters.

    Raises:
        InvalidArgumentError: it is not.
    """
    size = len(name.encode(errors="surrogatepass"))
    if not 1 <= size <= NAME_BYTES_MAX:
        raise InvalidArgumentError(
            f"the arena name {_shown(name)} has {size} bytes: use 1 to {NAME_BYTES_MAX}"
        )
    if any(c == "/" or unicodedata.category(c) in ("Cc", "Cs") for c in name):
        raise InvalidArgumentError(
            f"the arena name {_shown(name)} is not valid: "
            "leave out '/', line ends and other control characters"
        )
    return name


def _derive(secret: bytes, purpose: bytes, domain: str, size: int) -> bytes:
    return _keyed_hash(secret, purpose, check_domain(domain).encode(), size)


def _keyed_hash(secret: bytes, purpose: bytes, data: bytes, size: int) -> bytes:
    # BLAKE2b takes keys of up to 64 bytes; hashing first lets a secret be of any length.
    key = hashlib.blake2b(secret).digest()
    return hashlib.blake2b(data, key=key, digest_size=size, person=b"samepage " + purpose).digest()


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 80 else text[:80] + "...")
