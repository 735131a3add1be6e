"""Who publishes: hosts, their numbers and leases, in Redis. See docs/index.md."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from samepage_index.errors import NameTakenError
from samepage_index.store import Script, Store

NUMBER_BYTES = 2
NUMBERS = 1 << (8 * NUMBER_BYTES)

_RECORD = struct.Struct("<H8s40s")
_EPOCH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Host:
    """A host with a lease.

    Attributes:
        number: what its entries carry.
        remaining_ms: until its lease ends.
    """

    name: str
    number: int
    epoch: int
    merger_address: str
    remaining_ms: int


def pack_number(number: int) -> bytes:
    """A host's number as entries carry it."""
    return number.to_bytes(NUMBER_BYTES, "little")


class Hosts:
    """The hosts of the cluster, as one index process sees them. Keeps nothing itself.

    Every method raises StoreUnavailableError when Redis cannot be used.
    """

    def __init__(self, store: Store, prefix: str, lease_ms: int) -> None:
        self._store = store
        self._lease_ms = lease_ms
        # One hash tag: the scripts change these together.
        tag = f"{prefix}:{{hosts}}"
        self._keys = (tag, f"{tag}:leases", f"{tag}:numbers", f"{tag}:past")
        self._turn_key = f"{tag}:turn"
        self._announce = store.register("hosts.lua", "announce.lua")
        self._renew = store.register("hosts.lua", "renew.lua")
        self._leave = store.register("hosts.lua", "leave.lua")
        self._list = store.register("hosts.lua", "list_hosts.lua")
        self._condemn = store.register("hosts.lua", "condemn.lua")
        self._take_turn = store.register("take_turn.lua")

    async def announce(self, name: str, epoch: int, merger_address: str) -> tuple[int, bool]:
        """Give the host a lease. Returns its number, and whether the index still has what this
        epoch published.

        Raises:
            NameTakenError: another host has a lease under this name.
        """
        start = random.randrange(NUMBERS)
        number, *said = await self._run(
            self._announce, name, _EPOCH.pack(epoch), merger_address, self._lease_ms, start
        )
        if number is None:
            remaining_ms, address = said
            raise NameTakenError(name, address.decode(), remaining_ms)
        return int.from_bytes(number, "little"), bool(said[0])

    async def renew(self, name: str, number: int) -> bytes | None:
        """Keep the lease. Returns all live hosts' numbers, packed; None when the index does not
        have what this host published under that number."""
        answer: bytes | None = await self._run(
            self._renew, name, pack_number(number), self._lease_ms
        )
        return answer

    async def leave(self, name: str, number: int) -> None:
        """The host stops: it may come back at another address at once."""
        await self._run(self._leave, name, pack_number(number))

    async def live(self) -> list[Host]:
        """The hosts with a lease, by name."""
        answer = iter(await self._run(self._list))
        return sorted(_parse_hosts(answer), key=lambda host: host.name)

    async def condemn(self, keep_ms: int, most: int) -> bytes:
        """Forget hosts whose lease ended `keep_ms` ago. Returns at most `most` numbers that no
        host has any more, packed, whose entries can be swept."""
        answer: bytes = await self._run(self._condemn, keep_ms, most)
        return answer

    async def release(self, numbers: bytes) -> None:
        """These condemned numbers may be given to hosts again: no entry carries them."""
        each = [numbers[at : at + NUMBER_BYTES] for at in range(0, len(numbers), NUMBER_BYTES)]
        await self._store.run([("HDEL", self._keys[2], *each)])

    async def take_turn(self, who: str, ms: int) -> bool:
        """Whether `who` alone may sweep, for that long from now."""
        command = self._take_turn.call((self._turn_key,), who, ms)
        return bool((await self._store.run([command]))[0])

    async def _run(self, script: Script, *arguments: Any) -> Any:
        command = script.call(self._keys, *arguments, self._store.generation)
        return (await self._store.run([command]))[0]


def _parse_hosts(answer: Iterator[bytes]) -> Iterator[Host]:
    for name, record, remaining in zip(answer, answer, answer, strict=True):
        number, epoch, _ = _RECORD.unpack_from(record)
        address = record[_RECORD.size :].decode()
        yield Host(name.decode(), number, _EPOCH.unpack(epoch)[0], address, int(remaining))
