"""What a merger asks of the other daemons when pages cross hosts: an index and a scanner."""

from __future__ import annotations

import struct
from typing import Any

import grpc

from samepage.v1 import index_pb2, index_pb2_grpc, scanner_pb2, scanner_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


def _split(packed: bytes) -> list[bytes]:
    return [packed[low : low + 16] for low in range(0, len(packed), 16)]


class FakeClusterIndex(index_pb2_grpc.IndexServicer):
    """Attributes:
    hosts: the mergers' addresses, by the names of live hosts.
    held: fingerprints by host.
    """

    def __init__(self) -> None:
        self.hosts: dict[str, str] = {}
        self.held: dict[str, set[bytes]] = {}

    async def ListHosts(
        self, request: index_pb2.ListHostsRequest, context: Context
    ) -> index_pb2.ListHostsResponse:
        return index_pb2.ListHostsResponse(hosts=self._hosts())

    async def Lookup(
        self, request: index_pb2.LookupRequest, context: Context
    ) -> index_pb2.LookupResponse:
        hosts = self._hosts()
        holders = [
            struct.pack("<II", number, at)
            for number, fingerprint in enumerate(_split(request.fingerprints))
            for at, host in enumerate(hosts)
            if fingerprint in self.held.get(host.name, set())
        ]
        return index_pb2.LookupResponse(hosts=hosts, holders=b"".join(holders))

    def _hosts(self) -> list[index_pb2.Host]:
        return [
            index_pb2.Host(name=name, merger_address=address)
            for name, address in self.hosts.items()
        ]


class FakeLocatingScanner(scanner_pb2_grpc.ScannerServicer):
    """Attributes:
    places: agent, arena and page of each fingerprint.
    """

    def __init__(self) -> None:
        self.places: dict[bytes, tuple[bytes, int, int]] = {}

    async def Locate(
        self, request: scanner_pb2.LocateRequest, context: Context
    ) -> scanner_pb2.LocateResponse:
        arenas: list[tuple[bytes, int]] = []
        places = []
        for number, fingerprint in enumerate(_split(request.fingerprints)):
            if fingerprint not in self.places:
                continue
            agent, arena, page = self.places[fingerprint]
            if (agent, arena) not in arenas:
                arenas.append((agent, arena))
            places.append(struct.pack("<IIQ", number, arenas.index((agent, arena)), page))
        return scanner_pb2.LocateResponse(
            arenas=[scanner_pb2.LocatedArena(agent=a, arena=n) for a, n in arenas],
            places=b"".join(places),
        )
