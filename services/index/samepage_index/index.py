"""What the index does, without a word of gRPC."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import structlog

from samepage.daemon.secrets import DOMAIN_ID_BYTES
from samepage.errors import InvalidArgumentError
from samepage_index.entries import Entries, Size
from samepage_index.errors import ForgottenError
from samepage_index.fingerprints import FINGERPRINT_BYTES
from samepage_index.hosts import Host, Hosts

FINGERPRINTS_MAX = 65_536
ADDRESS_CHARACTERS_MAX = 512
EPOCH_MAX = (1 << 64) - 1

_HOST_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Lookup:
    """Who holds what.

    Attributes:
        hosts: those that hold at least one of the fingerprints.
        holders: packed little-endian pairs (u32 fingerprint's number, u32 number in `hosts`),
            ordered by fingerprint.
    """

    hosts: list[Host]
    holders: bytes


class Publisher:
    """One scanner's stream: a host and what it publishes.

    Every method raises StoreUnavailableError when Redis cannot be used; what was sent then may be
    stored or not, and is to be sent again.
    """

    def __init__(self, hosts: Hosts, entries: Entries) -> None:
        self._hosts = hosts
        self._entries = entries
        self._name = ""
        self._number = 0

    async def announce(self, name: str, epoch: int, merger_address: str) -> bool:
        """Say which host this is. Returns whether the index has what this epoch published.

        Raises:
            InvalidArgumentError: the name, the epoch or the address is not valid.
            NameTakenError: another host has a lease under this name.
        """
        if not _HOST_NAME.fullmatch(name):
            raise InvalidArgumentError(
                f"the host name {name[:300]!a} is not valid: "
                "use 1 to 253 characters of A-Z, a-z, 0-9, '.', '_' and '-'"
            )
        if not 0 < epoch <= EPOCH_MAX:
            raise InvalidArgumentError("the epoch must not be 0: draw a number at start")
        if len(merger_address) > ADDRESS_CHARACTERS_MAX:
            raise InvalidArgumentError(
                f"the merger's address has more than {ADDRESS_CHARACTERS_MAX} characters"
            )
        self._number, resumed = await self._hosts.announce(name, epoch, merger_address)
        self._name = name
        log.info("host announced", host=name, resumed=resumed, address=merger_address)
        return resumed

    async def publish(self, domain_id: bytes, added: bytes, removed: bytes) -> int:
        """Store what is new and what is gone. Returns how many of the distinct added fingerprints
        another live host holds too.

        Raises:
            InvalidArgumentError: `announce` did not come first, or a length is wrong.
            ForgottenError: the index lost this host; nothing of the batch counts.
        """
        self._check_announced()
        check_domain_id(domain_id)
        check_fingerprints(added, "added")
        check_fingerprints(removed, "removed")
        live = await self._renew_or_raise()
        held = await self._entries.publish(domain_id, self._number, live, added, removed)
        # Redis may have been flushed between the two: then others may not see this batch.
        await self._renew_or_raise()
        return held

    async def renew(self) -> bool:
        """Keep the lease. Returns False when the index lost this host: announce again.

        Raises:
            InvalidArgumentError: `announce` did not come first.
        """
        self._check_announced()
        return await self._hosts.renew(self._name, self._number) is not None

    async def leave(self) -> None:
        """The host stops: whoever comes next under its name is let in at once.

        Raises:
            InvalidArgumentError: `announce` did not come first.
        """
        self._check_announced()
        await self._hosts.leave(self._name, self._number)

    def _check_announced(self) -> None:
        if not self._name:
            raise InvalidArgumentError("the first request of a stream must be an Announce")

    async def _renew_or_raise(self) -> bytes:
        live = await self._hosts.renew(self._name, self._number)
        if live is None:
            raise ForgottenError(
                f"the index does not know this epoch of host {self._name} any more (Redis lost "
                "its data, or the host announced another epoch): announce again"
            )
        return live


class Index:
    """The map from fingerprint to holders.

    Args:
        store_name: says which Redis it is, of what version.

    Every method raises StoreUnavailableError when Redis cannot be used.
    """

    def __init__(self, hosts: Hosts, entries: Entries, store_name: Callable[[], str]) -> None:
        self._hosts = hosts
        self._entries = entries
        self._store_name = store_name

    def publisher(self) -> Publisher:
        """For a new stream."""
        return Publisher(self._hosts, self._entries)

    async def lookup(self, domain_id: bytes, fingerprints: bytes) -> Lookup:
        """Who holds these fingerprints.

        Raises:
            InvalidArgumentError: a length is wrong.
        """
        check_domain_id(domain_id)
        check_fingerprints(fingerprints, "fingerprints")
        live = await self._hosts.live()
        positions, holders = await self._entries.lookup(domain_id, fingerprints, live)
        used, numbers = np.unique(holders, return_inverse=True)
        pairs = np.empty((len(positions), 2), "<u4")
        pairs[:, 0], pairs[:, 1] = positions, numbers
        return Lookup([live[i] for i in used.tolist()], pairs.tobytes())

    async def hosts(self) -> list[Host]:
        """The hosts with a lease, by name."""
        return await self._hosts.live()

    async def stats(self) -> tuple[Size, int, str]:
        """Sizes, how many hosts have a lease, and which Redis it is."""
        return await self._entries.size(), len(await self._hosts.live()), self._store_name()


def check_domain_id(domain_id: bytes) -> None:
    """Raises InvalidArgumentError unless it has 16 bytes."""
    if len(domain_id) != DOMAIN_ID_BYTES:
        raise InvalidArgumentError(f"domain_id has {len(domain_id)} bytes, not {DOMAIN_ID_BYTES}")


def check_fingerprints(packed: bytes, name: str) -> None:
    """Raises InvalidArgumentError unless these are packed fingerprints, and not too many."""
    count, rest = divmod(len(packed), FINGERPRINT_BYTES)
    if rest:
        raise InvalidArgumentError(
            f"{name} has {len(packed)} bytes, which is no multiple of {FINGERPRINT_BYTES}"
        )
    if count > FINGERPRINTS_MAX:
        raise InvalidArgumentError(
            f"{name} holds {count} fingerprints: send at most {FINGERPRINTS_MAX} at a time"
        )
