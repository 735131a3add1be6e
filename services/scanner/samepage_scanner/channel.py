"""What agents ask of the scanner, over scanner.sock (docs/protocol.md)."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
from collections.abc import Callable, Sequence

from samepage.daemon import wire
from samepage.daemon.identity import DeniedError, Identity, choose_domain
from samepage.daemon.peers import Peer
from samepage.daemon.secrets import check_domain, check_name
from samepage.errors import InvalidArgumentError
from samepage_scanner.books import Arena, Books, BooksFullError
from samepage_scanner.passes import Passes, ShareRefusedError

ARENA_PAGES_MAX = 1 << 36
ARENAS_MAX = 4096
SHARES_MAX = 64


class Channel:
    """The handler of the scanner's agents.

    Args:
        opened: called for every new arena.
        identity: says which domains an agent may use.
    """

    def __init__(
        self, books: Books, passes: Passes, opened: Callable[[], None], identity: Identity
    ) -> None:
        self._identity = identity
        self._books = books
        self._passes = passes
        self._opened = opened
        self._shares: dict[Peer, set[asyncio.Task[None]]] = {}
        # Arenas that were refused, and why: who shares one is told the same.
        self._refused: dict[Peer, dict[int, tuple[int, str]]] = {}

    def connected(self, peer: Peer) -> None:
        """See peers.Handler."""
        self._books.connect(peer)
        self._shares[peer] = set()
        self._refused[peer] = {}

    def disconnected(self, peer: Peer) -> None:
        """See peers.Handler."""
        self._books.disconnect(peer)
        del self._refused[peer]
        for share in self._shares.pop(peer):
            share.cancel()

    def received(self, peer: Peer, message: wire.Message, descriptors: Sequence[int]) -> None:
        """See peers.Handler."""
        refused = self._refused[peer].get(message.arena)
        if message.type is wire.Type.ARENA_OPEN:
            self._open(peer, message)
        elif message.type is wire.Type.SHARE and refused is not None:
            peer.refuse(message, *refused)
        elif message.type is wire.Type.ARENA_CLOSE and refused is not None:
            del self._refused[peer][message.arena]
        elif message.type is wire.Type.ARENA_CLOSE:
            _expect_empty(message)
            self._books.close(self._arena(peer, message))
        elif message.type is wire.Type.SHARE:
            _expect_empty(message)
            self._share(peer, message, self._arena(peer, message))
        else:
            raise wire.ProtocolError(f"{message.type.name} is not for a scanner")

    def _open(self, peer: Peer, message: wire.Message) -> None:
        wanted = wire.unpack_arena_open(message)
        arenas = self._books.agents[peer].arenas
        if message.arena == 0 or message.arena in arenas:
            raise wire.ProtocolError(f"ARENA_OPEN of arena {message.arena}")
        try:
            check_name(wanted.name)
            domain = check_domain(choose_domain(self._identity, peer, wanted.domain))
        except InvalidArgumentError as error:
            self._refuse(peer, message, errno.EINVAL, str(error))
            return
        except DeniedError as denied:
            self._refuse(peer, message, *denied.args)
            return
        if not 0 < wanted.pages <= ARENA_PAGES_MAX:
            text = f"an arena of {wanted.pages} pages: it must have 1 to {ARENA_PAGES_MAX}"
            self._refuse(peer, message, errno.EINVAL, text)
            return
        if len(arenas) >= ARENAS_MAX:
            text = f"this process has {ARENAS_MAX} arenas already: close some, or make larger ones"
            self._refuse(peer, message, errno.EMFILE, text)
            return
        try:
            arena = self._books.open(peer, message.arena, wanted.name, domain, wanted.pages)
        except BooksFullError:
            text = "the scanner's books have no room for an arena of this size: raise its pages_max"
            self._refuse(peer, message, errno.ENOMEM, text)
            return
        self._refused[peer].pop(message.arena, None)
        answer = wire.pack_arena_opened(arena.domain.seed, wanted.domain, domain)
        peer.send(wire.Type.ARENA_OPENED, message.seq, message.arena, answer)
        self._opened()

    def _refuse(self, peer: Peer, message: wire.Message, error: int, text: str) -> None:
        refused = self._refused[peer]
        if len(refused) < ARENAS_MAX:
            refused[message.arena] = error, text
        peer.refuse(message, error, text)

    def _share(self, peer: Peer, message: wire.Message, arena: Arena) -> None:
        shares = self._shares[peer]
        if len(shares) >= SHARES_MAX:
            peer.refuse(message, errno.EAGAIN, "too many shares at once: wait for some to end")
            return
        share = asyncio.create_task(self._answer_share(peer, message, arena))
        shares.add(share)
        share.add_done_callback(shares.discard)

    async def _answer_share(self, peer: Peer, message: wire.Message, arena: Arena) -> None:
        try:
            [report] = await self._passes.share(arena.domain, [arena])
        except ShareRefusedError as error:
            peer.refuse(message, error.error, error.text)
        else:
            payload = wire.SHARED.pack(*dataclasses.astuple(report))
            peer.send(wire.Type.SHARED, message.seq, message.arena, payload)

    def _arena(self, peer: Peer, message: wire.Message) -> Arena:
        try:
            return self._books.agents[peer].arenas[message.arena]
        except KeyError as error:
            raise wire.ProtocolError(
                f"{message.type.name} of arena {message.arena}, which is not open"
            ) from error


def _expect_empty(message: wire.Message) -> None:
    if message.payload:
        raise wire.ProtocolError(f"{message.type.name} with {len(message.payload)} bytes")
