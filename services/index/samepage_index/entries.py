"""Which host holds which fingerprint: the packed buckets in Redis. See docs/index.md.

Everything that changes a shard is one Lua script call on it, so any number of index processes can
work on it at once. What a call does may be done twice without harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from samepage_index.fingerprints import SHARDS, group
from samepage_index.hosts import NUMBERS, Host, pack_number
from samepage_index.store import Command, Store

_SWEEP_BUCKETS = 256
_BEHIND_ALL_BUCKETS = 1 << 32

U32 = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Size:
    """Entries are (fingerprint, host) pairs; `stored_bytes` is what Redis spends on them."""

    entries: int = 0
    fingerprints: int = 0
    stored_bytes: int = 0


class Entries:
    """All domains' entries, as one index process sees them. Keeps nothing itself.

    Every method raises StoreUnavailableError when Redis cannot be used.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix.encode()
        self._domains_key = self._prefix + b":domains"
        self._publish = store.register("shard.lua", "publish.lua")
        self._lookup = store.register("shard.lua", "lookup.lua")
        self._sweep = store.register("shard.lua", "sweep.lua")
        self._measure = store.register("shard.lua", "measure.lua")

    async def publish(
        self, domain_id: bytes, number: int, live: bytes, added: bytes, removed: bytes
    ) -> int:
        """Store what a host has and has not any more; what is in both, it has.

        Args:
            number: the host's.
            live: the live hosts' numbers, packed.
            added, removed: fingerprints, packed.

        Returns:
            How many distinct added fingerprints another live host has too.
        """
        gone = {part.shard: part.keys for part in group(removed)}
        new = {part.shard: part.keys for part in group(added)}
        mine = pack_number(number)
        commands = [
            self._publish.call(
                (self._shard_key(domain_id, shard),),
                mine,
                live,
                gone.get(shard, b""),
                new.get(shard, b""),
            )
            for shard in sorted(gone.keys() | new.keys())
        ]
        if not commands:
            return 0
        # Before, so that no entry is ever in a domain that is not listed; after, because a janitor
        # may have taken the domain off the list while it was still empty.
        enlist: Command = ("SADD", self._domains_key, domain_id)
        answers = await self._store.run([enlist], commands, [enlist])
        return sum(answers[1:-1])

    async def lookup(
        self, domain_id: bytes, fingerprints: bytes, hosts: Sequence[Host]
    ) -> tuple[U32, U32]:
        """Who of `hosts` holds these fingerprints.

        Returns:
            Two arrays of the same length, one element an entry: the fingerprint's number in
            `fingerprints`, ascending, and the host's number in `hosts`.
        """
        live = b"".join(pack_number(host.number) for host in hosts)
        parts = list(group(fingerprints))
        commands = [
            self._lookup.call((self._shard_key(domain_id, part.shard),), live, part.keys)
            for part in parts
        ]
        answers = await self._store.run(commands) if commands and live else []
        found = [
            (part.positions[pairs[:, 0]], pairs[:, 1])
            for part, answer in zip(parts, answers, strict=False)
            for pairs in (np.frombuffer(answer, "<u2").reshape(-1, 2),)
        ]
        if not found:
            return np.empty(0, np.uint32), np.empty(0, np.uint32)
        index_of = np.zeros(NUMBERS, np.uint32)
        index_of[[host.number for host in hosts]] = np.arange(len(hosts))
        positions = np.concatenate([pair[0] for pair in found]).astype(np.uint32)
        holders = index_of[np.concatenate([pair[1] for pair in found])]
        order = np.lexsort((holders, positions))
        return positions[order], holders[order]

    async def size(self) -> Size:
        """Sizes of all domains together."""
        total = np.zeros(3, np.int64)
        for domain_id in await self.domains():
            commands = [self._measure.call((key,)) for key in self._shard_keys(domain_id)]
            total += np.array(await self._store.run(commands), np.int64).sum(axis=0)
        return Size(*total.tolist())

    async def domains(self) -> list[bytes]:
        """The ids of the domains that may have entries."""
        return sorted((await self._store.run([("SMEMBERS", self._domains_key)]))[0])

    async def sweep_shard(self, domain_id: bytes, shard: int, numbers: bytes) -> int:
        """Delete the entries that carry one of these (packed) numbers. Returns how many."""
        key = self._shard_key(domain_id, shard)
        swept, first, merges_at_first = 0, 0, 0
        while True:
            buckets, merges, deleted, sparse = await self._sweep_some(key, numbers, first)
            swept += deleted
            if first == 0:
                merges_at_first = merges
            if merges != merges_at_first:
                # A merge moved entries from a bucket yet to be swept to one that was.
                first = 0
            elif first + _SWEEP_BUCKETS < buckets:
                first += _SWEEP_BUCKETS
            else:
                break
        while sparse:
            *_, sparse = await self._sweep_some(key, numbers, _BEHIND_ALL_BUCKETS)
        return swept

    async def _sweep_some(self, key: bytes, numbers: bytes, first: int) -> list[int]:
        command = self._sweep.call((key,), numbers, first, _SWEEP_BUCKETS)
        answer: list[int] = (await self._store.run([command]))[0]
        return answer

    async def forget_if_empty(self, domain_id: bytes) -> None:
        """Take a domain without entries off the list of domains."""
        exist: list[Command] = [("EXISTS", key) for key in self._shard_keys(domain_id)]
        unlist: Command = ("SREM", self._domains_key, domain_id)
        if not any(await self._store.run(exist)):
            _, *shards = await self._store.run([unlist], exist)
            if any(shards):
                await self._store.run([("SADD", self._domains_key, domain_id)])

    def _shard_key(self, domain_id: bytes, shard: int) -> bytes:
        # The hash tag spreads a domain's shards over the nodes of a cluster.
        return b"%b:{%b:%02x}" % (self._prefix, domain_id.hex().encode(), shard)

    def _shard_keys(self, domain_id: bytes) -> list[bytes]:
        return [self._shard_key(domain_id, shard) for shard in range(SHARDS)]
