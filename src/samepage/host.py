"""What operators ask the merger of a host."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from samepage import accounts, rpc
from samepage.reports import ArenaInfo, HostAccount, NodeStats
from samepage.v1 import merger_pb2, merger_pb2_grpc


def list_arenas(directory: str) -> list[ArenaInfo]:
    """Return the arenas of the host, ordered by domain and name.

    Raises:
        NotRunningError, ServiceUnavailableError: no merger answers.
    """
    with rpc.channel(rpc.socket_address(Path(directory), rpc.MERGER_SOCKET)) as channel:
        stub = merger_pb2_grpc.MergerStub(channel)
        answer = stub.ListArenas(merger_pb2.ListArenasRequest(), timeout=rpc.TIMEOUT_SECONDS)
    arenas = (
        ArenaInfo(
            name=arena.name,
            domain=arena.domain,
            pid=arena.pid,
            pages=arena.pages,
            shared_pages=arena.shared_pages,
            saved_bytes=arena.saved_bytes,
        )
        for arena in answer.arenas
    )
    return sorted(arenas, key=lambda arena: (arena.domain, arena.name))


def node_stats(directory: str) -> NodeStats:
    """Return what the merger holds and has done.

    Raises:
        NotRunningError, ServiceUnavailableError: no merger answers.
    """
    with rpc.channel(rpc.socket_address(Path(directory), rpc.MERGER_SOCKET)) as channel:
        stub = merger_pb2_grpc.MergerStub(channel)
        status = stub.GetMergerStatus(
            merger_pb2.GetMergerStatusRequest(), timeout=rpc.TIMEOUT_SECONDS
        )
    names = [field.name for field in dataclasses.fields(NodeStats)]
    return NodeStats(**{name: getattr(status, name) for name in names})


def host_account(directory: str) -> HostAccount:
    """Return the host's account with all its parts.

    Raises:
        NotRunningError, ServiceUnavailableError: no merger answers.
        ProtocolVersionError: it is too old for accounts.
    """
    with rpc.channel(rpc.socket_address(Path(directory), rpc.MERGER_SOCKET)) as channel:
        stub = merger_pb2_grpc.MergerStub(channel)
        request = merger_pb2.GetAccountsRequest()
        return accounts.unpack(stub.GetAccounts(request, timeout=rpc.TIMEOUT_SECONDS))
