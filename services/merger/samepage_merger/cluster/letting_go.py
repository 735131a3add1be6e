"""What a holder does before it stops in order: it tells the owners what it wants to let go of.

An owner answers when it has other copies of the pages, and for which; those are not held any more.
The rest stays in the store beside the holds' file, for the merger that comes next on this host.
"""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import structlog

from samepage.v1 import pages_pb2
from samepage_merger.cluster.holds import HELD, Lease, host_of
from samepage_merger.cluster.hosts import HostAwayError, Hosts
from samepage_merger.domains import Domain, Domains

_PART_PAGES = 1024

log = structlog.get_logger(__name__)


async def let_go(domains: Domains, hosts: Hosts) -> None:
    """Let go of what is held for other hosts, as far as they agree; may be cancelled."""
    leases = [
        (domain, lease)
        for domain in list(domains)
        for lease in domain.holds
        if lease.snapshot == HELD and len(lease.slots)
    ]
    try:
        await asyncio.gather(*(_let_go(domain, lease, hosts) for domain, lease in leases))
    finally:
        if left := sum(len(lease.slots) for _, lease in leases):
            log.warning("not all that is held for other hosts could be let go of", slots=left)


async def _let_go(domain: Domain, lease: Lease, hosts: Hosts) -> None:
    slots = lease.slots.all()
    name, store_id = host_of(lease.owner)
    try:
        owner = await hosts.find(name)
        for low in range(0, slots.size if owner is not None else 0, _PART_PAGES):
            assert owner is not None
            part = slots[low : low + _PART_PAGES]
            digests = await domain.digester.pages_apart(domain.store.read_all(part))
            request = pages_pb2.LetGoRequest(
                domain_id=domain.id,
                holder=hosts.own,
                digests=digests.tobytes(),
                store_id=store_id,
            )
            answer = await owner.stub.LetGo(request)
            agreed = np.frombuffer(answer.agreed, np.uint8) == 1
            if agreed.size == part.size:
                domain.holds.release(lease, part[agreed])
    except HostAwayError as error:
        log.info("an owner cannot be told", owner=name, why=str(error))
    except grpc.aio.AioRpcError as error:
        log.info("an owner cannot be told", owner=name, why=error.details())
