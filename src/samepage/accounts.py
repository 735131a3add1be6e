"""Accounts as messages: the merger packs them, clients unpack them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from samepage.errors import ServiceUnavailableError
from samepage.reports import (
    ACCOUNT_FIELDS,
    Account,
    ArenaAccount,
    DomainAccount,
    HostAccount,
    ProcessAccount,
)
from samepage.v1 import merger_pb2

# Names are short, so that a response stays well below a megabyte.
_PARTS_A_RESPONSE = 1000


def pack(host: HostAccount) -> Iterator[merger_pb2.GetAccountsResponse]:
    """Return the responses that make up an account."""
    for low in range(0, len(host.arenas), _PARTS_A_RESPONSE):
        arenas = host.arenas[low : low + _PARTS_A_RESPONSE]
        yield merger_pb2.GetAccountsResponse(arenas=map(_pack_arena, arenas))
    for low in range(0, len(host.processes), _PARTS_A_RESPONSE):
        processes = host.processes[low : low + _PARTS_A_RESPONSE]
        yield merger_pb2.GetAccountsResponse(processes=map(_pack_process, processes))
    for low in range(0, len(host.domains), _PARTS_A_RESPONSE):
        domains = host.domains[low : low + _PARTS_A_RESPONSE]
        yield merger_pb2.GetAccountsResponse(domains=map(_pack_domain, domains))
    yield merger_pb2.GetAccountsResponse(
        host=merger_pb2.HostAccount(
            node=host.node,
            account=_pack(host),
            store_bytes=host.store_bytes,
            unattributed_bytes=host.unattributed_bytes,
        )
    )


def unpack(responses: Iterable[merger_pb2.GetAccountsResponse]) -> HostAccount:
    """Return the account that responses make up.

    Raises:
        ServiceUnavailableError: the last one is missing.
    """
    arenas: list[ArenaAccount] = []
    processes: list[ProcessAccount] = []
    domains: list[DomainAccount] = []
    for response in responses:
        arenas += map(_unpack_arena, response.arenas)
        processes += map(_unpack_process, response.processes)
        domains += map(_unpack_domain, response.domains)
        if response.HasField("host"):
            return HostAccount(
                **_unpack(response.host.account),
                node=response.host.node,
                store_bytes=response.host.store_bytes,
                unattributed_bytes=response.host.unattributed_bytes,
                domains=tuple(domains),
                processes=tuple(processes),
                arenas=tuple(arenas),
            )
    raise ServiceUnavailableError("the merger ended its account too early: ask again")


def _pack(account: Account) -> merger_pb2.Account:
    return merger_pb2.Account(**{name: getattr(account, name) for name in ACCOUNT_FIELDS})


def _unpack(account: merger_pb2.Account) -> dict[str, int]:
    return {name: getattr(account, name) for name in ACCOUNT_FIELDS}


def _pack_arena(arena: ArenaAccount) -> merger_pb2.ArenaAccount:
    return merger_pb2.ArenaAccount(
        name=arena.name,
        domain=arena.domain,
        agent=bytes.fromhex(arena.agent),
        pid=arena.pid,
        command=arena.command,
        account=_pack(arena),
    )


def _unpack_arena(arena: merger_pb2.ArenaAccount) -> ArenaAccount:
    return ArenaAccount(
        **_unpack(arena.account),
        name=arena.name,
        domain=arena.domain,
        agent=arena.agent.hex(),
        pid=arena.pid,
        command=arena.command,
    )


def _pack_process(process: ProcessAccount) -> merger_pb2.ProcessAccount:
    return merger_pb2.ProcessAccount(
        pid=process.pid,
        agent=bytes.fromhex(process.agent),
        command=process.command,
        arenas=process.arenas,
        account=_pack(process),
    )


def _unpack_process(process: merger_pb2.ProcessAccount) -> ProcessAccount:
    return ProcessAccount(
        **_unpack(process.account),
        pid=process.pid,
        agent=process.agent.hex(),
        command=process.command,
        arenas=process.arenas,
    )


def _pack_domain(domain: DomainAccount) -> merger_pb2.DomainAccount:
    return merger_pb2.DomainAccount(
        name=domain.name,
        arenas=domain.arenas,
        account=_pack(domain),
        store_bytes=domain.store_bytes,
        unattributed_bytes=domain.unattributed_bytes,
    )


def _unpack_domain(domain: merger_pb2.DomainAccount) -> DomainAccount:
    return DomainAccount(
        **_unpack(domain.account),
        name=domain.name,
        arenas=domain.arenas,
        store_bytes=domain.store_bytes,
        unattributed_bytes=domain.unattributed_bytes,
    )
