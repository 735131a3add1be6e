"""Hosts that publish to a real index, and in plain Python what it should say of them."""

from __future__ import annotations

import asyncio
import random

import grpc
from helpers.index_harness import Client, Stream

DOMAINS = (b"d" * 16, b"o" * 16)
HOSTS = ("alpha", "beta")


def fingerprint(number: int) -> bytes:
    """One of its own for each number."""
    return random.Random(number).randbytes(16)


PAGES = [fingerprint(number) for number in range(2000)]


class Host:
    """A scanner as the index sees it: it remembers what it holds, and tells the index until that
    knows everything."""

    def __init__(self, name: str, client: Client) -> None:
        self.name = name
        self.restarts = 0
        self._client = client
        self._stream: Stream | None = None
        self._pages: dict[bytes, set[bytes]] = {domain: set() for domain in DOMAINS}

    def holds(self, domain: bytes) -> set[bytes]:
        return self._pages[domain]

    async def change(self, domain: bytes, added: list[bytes], removed: list[bytes]) -> None:
        """Hold other pages from now on, and tell."""
        self._pages[domain] -= set(removed)
        self._pages[domain] |= set(added)
        await self._until_told(domain, added, removed)

    async def keep(self) -> None:
        """Renew the lease; tell everything if the index knows nothing."""
        try:
            if self._stream is not None and await self._stream.renew():
                return
        except grpc.aio.AioRpcError:
            self._stream = None
        await self._until_told(DOMAINS[0], [], [])

    async def _until_told(self, domain: bytes, added: list[bytes], removed: list[bytes]) -> None:
        while True:
            try:
                if self._stream is None:
                    self._stream = self._client.stream()
                    if not await self._stream.announce(self.name):
                        await self._tell_all(self._stream)
                await self._stream.publish(domain, added, removed)
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE, error.details()
                self._stream = None
                # what a scanner's back-off is for: the cluster is electing a primary
                await asyncio.sleep(0.05)
            else:
                return

    async def _tell_all(self, stream: Stream) -> None:
        self.restarts += 1
        for domain, pages in self._pages.items():
            await stream.publish(domain, sorted(pages))


async def agrees(client: Client, hosts: list[Host]) -> bool:
    """Whether the index says what a plain comparison says."""
    for host in hosts:
        await host.keep()
    for domain in DOMAINS:
        held = {page: {host.name for host in hosts if page in host.holds(domain)} for page in PAGES}
        try:
            found = await client.holders(domain, PAGES)
        except grpc.aio.AioRpcError:
            return False
        if found != {page: names for page, names in held.items() if names}:
            return False
    return True


async def filled(client: Client) -> list[Host]:
    hosts = [Host(name, client) for name in HOSTS]
    for number, host in enumerate(hosts):
        for domain in DOMAINS:
            await host.change(domain, PAGES[number * 500 : 1500], [])
    assert await agrees(client, hosts)
    return hosts
