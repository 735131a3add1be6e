"""What the merger does with identities: it waits for them, and asks them about each domain."""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from fakes.fake_merging_agent import FakeMergingAgent, RefusedError, random_pages
from helpers.merger_host import MergerHost, store_directory
from helpers.waiting import until

from samepage.daemon import wire
from samepage.daemon.identity import DeniedError
from samepage.daemon.identity.base import Caller
from samepage_merger.arena import Arena, Session

pytestmark = pytest.mark.needs("root")


class SlowIdentity:
    """Takes a token for the name of a domain, when it is told to go on."""

    def __init__(self) -> None:
        self.decided: Counter[str] = Counter()
        self.go = asyncio.Event()
        self.tokens: list[bytes] = []
        self.own: dict[Caller, str] = {}

    def domain(self, caller: Caller, wanted: str) -> str:
        own = self.own.get(caller)
        if own is None or wanted not in ("", own):
            raise DeniedError(errno.EACCES, f"not {wanted!r}")
        return own

    async def present(self, caller: Caller, token: bytes) -> None:
        self.tokens.append(token)
        await self.go.wait()
        self.own[caller] = token.decode()

    def forget(self, caller: Caller) -> None:
        self.own.pop(caller, None)

    async def close(self) -> None:
        pass


class Clones:
    """Takes down what is asked for."""

    def __init__(self) -> None:
        self.wanted: list[wire.Clone] = []

    def clone(self, session: Session, message: wire.Message) -> None:
        self.wanted.append(wire.unpack_clone(message))
        session.peer.send(
            wire.Type.CLONING, message.seq, message.arena, wire.CLONING.pack(1, 0, 0, 1)
        )

    def opened(self, session: Session, arena: Arena) -> None:
        pass

    def closed(self, session: Session, number: int) -> None:
        pass

    def disconnected(self, session: Session) -> None:
        pass


@pytest.fixture
def store() -> Iterator[Path]:
    with store_directory() as path:
        yield path


@pytest.fixture
async def identity() -> SlowIdentity:
    return SlowIdentity()


@pytest.fixture
async def host(tmp_path: Path, store: Path, identity: SlowIdentity) -> AsyncIterator[MergerHost]:
    host = MergerHost(tmp_path, store, identity=identity)
    host.agents.clones = Clones()
    yield host
    host.stop()


@pytest.fixture
async def agent(host: MergerHost) -> AsyncIterator[FakeMergingAgent]:
    agent = FakeMergingAgent(host.path)
    await agent.connect()
    yield agent
    await agent.die()


async def test_messages_after_a_credential_wait_for_it(
    agent: FakeMergingAgent, identity: SlowIdentity
) -> None:
    agent.send(wire.Type.CREDENTIAL, 0, b"shop")
    opening = asyncio.create_task(agent.open("a", random_pages(1, 1), ""))
    # The daemon goes on with others meanwhile.
    other = FakeMergingAgent(agent.path)
    await other.connect()
    await until(lambda: identity.tokens == [b"shop"])
    assert not opening.done()
    identity.go.set()
    assert (await opening).domain == "shop"
    await other.die()


async def test_a_domain_of_others_is_refused(
    agent: FakeMergingAgent, identity: SlowIdentity
) -> None:
    identity.go.set()
    with pytest.raises(RefusedError) as refused:
        await agent.open("a", random_pages(1, 1), "")
    assert refused.value.args == (errno.EACCES, "not ''")
    agent.send(wire.Type.CREDENTIAL, 0, b"shop")
    with pytest.raises(RefusedError) as refused:
        await agent.open("a", random_pages(1, 1), "bank")
    assert refused.value.args == (errno.EACCES, "not 'bank'")
    assert (await agent.open("a", random_pages(1, 1), "shop")).domain == "shop"


async def test_clones_are_of_ones_own_domains(
    host: MergerHost, agent: FakeMergingAgent, identity: SlowIdentity
) -> None:
    identity.go.set()
    agent.send(wire.Type.CREDENTIAL, 0, b"shop")

    def clone(domain: str) -> bytes:
        return wire.pack_clone(wire.Clone(False, False, 0, "host-b", "a", "b", domain))

    with pytest.raises(RefusedError) as refused:
        await agent.request(wire.Type.CLONE, 1, clone("bank"))
    assert refused.value.args[0] == errno.EACCES
    for domain in ("", "shop"):
        await agent.request(wire.Type.CLONE, 1, clone(domain))
    assert isinstance(host.agents.clones, Clones)
    assert [wanted.domain for wanted in host.agents.clones.wanted] == ["shop", "shop"]


async def test_an_agent_that_ends_while_it_is_looked_at(
    agent: FakeMergingAgent, identity: SlowIdentity
) -> None:
    other = FakeMergingAgent(agent.path)
    await other.connect()
    other.send(wire.Type.CREDENTIAL, 0, b"shop")
    await until(lambda: identity.tokens == [b"shop"])
    await other.die()
    identity.go.set()
    agent.send(wire.Type.CREDENTIAL, 0, b"bank")
    assert (await agent.open("a", random_pages(1, 1), "")).domain == "bank"


async def test_an_identity_that_fails_lets_nobody_in(
    agent: FakeMergingAgent, identity: SlowIdentity
) -> None:
    identity.go.set()
    agent.send(wire.Type.CREDENTIAL, 0, b"\xff")
    async with asyncio.timeout(10):
        await agent.ended.wait()
