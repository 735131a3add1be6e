"""Messages between agents and daemons, as docs/protocol.md defines them."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PAGE_SIZE = 4096
MAGIC = 0x5053
VERSION = 3
#: What daemons speak: an agent of the version before goes on working when they are upgraded.
VERSIONS = (2, 3)
MESSAGE_MAX = 65_536
FINGERPRINT_PAGES_MAX = 16_384
READ_PAGES_MAX = 512
REPLACE_PAGES_MAX = 4_096
ZERO_SLOT = 0

HEADER = struct.Struct("<HBBIII")
HELLO = struct.Struct("<16sII")
WELCOME = struct.Struct("<QII")
REFUSED = struct.Struct("<I")
ARENA_OPEN = struct.Struct("<QQIHHQ16s")
ARENA_OPEN_V2 = struct.Struct("<QQIHH")
ARENA_OPENED = struct.Struct("<Q")
PAGE_RANGE = struct.Struct("<QQ")
REPLACE = struct.Struct("<II")
#: Flag of REPLACE: absent pages of an arena that is being cloned map their slots.
REPLACE_ABSENT = 1
FREEZE = struct.Struct("<I")
CHANGED = struct.Struct("<QQ")
STALL_BUCKETS = 16
STALLS = struct.Struct(f"<{STALL_BUCKETS}Q")
DONE = struct.Struct("<iI")
SHARED = struct.Struct("<11Q")
ACCOUNTED = struct.Struct("<QQ")
COUNTED_BYTES = 8
AWAY_PAGES_MAX = 1_600
DIGEST_BYTES = 32
EVICT_PAGES_MAX = 512
CLONE = struct.Struct("<IIHHHH")
CLONING = struct.Struct("<4Q")
CLONED = struct.Struct("<6Q")
EVICTED = struct.Struct("<4Q")

EXTENT = np.dtype([("page", "<u8"), ("count", "<u8"), ("slot", "<u8")])
RANGE = np.dtype([("page", "<u8"), ("count", "<u8")])
AWAY = np.dtype([("page", "<u8"), ("digest", "V32")])


class Type(enum.IntEnum):
    """What a message is."""

    HELLO = 1
    WELCOME = 2
    REFUSED = 3
    ARENA_OPEN = 4
    ARENA_OPENED = 5
    ARENA_CLOSE = 6
    EXTENTS = 8
    AWAY_PAGES = 9
    FINGERPRINT = 16
    READ = 17
    REPLACE = 18
    RESTORE = 19
    DONE = 20
    RESTORED = 21
    CHANGED = 22
    STALLS = 23
    COUNT = 24
    AWAY = 25
    EVICT = 26
    FILL = 27
    POISON = 28
    FREEZE = 29
    LEAVE = 30
    SHARE = 32
    SHARED = 33
    ACCOUNT = 34
    ACCOUNTED = 35
    CREDENTIAL = 36
    CLONE = 37
    CLONING = 38
    CLONED = 39
    FETCH = 40
    EVICT_ARENA = 41
    EVICTED = 42
    SEALED = 43


#: Messages that older versions of the protocol lack.
SINCE = {
    Type.AWAY_PAGES: 3,
    Type.AWAY: 3,
    Type.EVICT: 3,
    Type.FILL: 3,
    Type.POISON: 3,
    Type.FREEZE: 3,
    Type.LEAVE: 3,
    Type.CREDENTIAL: 3,
    Type.CLONE: 3,
    Type.CLONING: 3,
    Type.CLONED: 3,
    Type.FETCH: 3,
    Type.EVICT_ARENA: 3,
    Type.EVICTED: 3,
    Type.SEALED: 3,
}


class Outcome(enum.IntEnum):
    """What became of one page under an order."""

    MERGED = 0
    DIFFERS = 1
    PINNED = 2
    ABSENT = 3
    BUSY = 4
    NO_MAPPING = 5
    UNSUPPORTED = 6


class PageState(enum.IntEnum):
    """What a page was when its fingerprint was made."""

    ABSENT = 0
    PRIVATE = 1
    SHARED = 2
    ZERO = 3


class ProtocolError(Exception):
    """A peer broke the protocol; drop it."""


class UnsupportedVersionError(ProtocolError):
    """A peer speaks a version that this side does not; refuse it with EPROTONOSUPPORT."""


@dataclass(frozen=True, slots=True)
class Message:
    """One received message; `payload` is what follows the header."""

    type: Type
    seq: int
    arena: int
    payload: bytes
    version: int = VERSION


def pack(
    kind: Type, seq: int = 0, arena: int = 0, payload: bytes = b"", version: int = VERSION
) -> bytes:
    """Return the packet of a message."""
    return HEADER.pack(MAGIC, version, kind, HEADER.size + len(payload), seq, arena) + payload


def parse(packet: bytes) -> Message:
    """Return the message in a packet.

    Raises:
        UnsupportedVersionError: the peer speaks another version.
        ProtocolError: it is no message of this protocol.
    """
    if len(packet) < HEADER.size:
        raise ProtocolError(f"a packet of {len(packet)} bytes is shorter than a header")
    magic, version, kind, length, seq, arena = HEADER.unpack_from(packet)
    if magic != MAGIC:
        raise ProtocolError(f"magic 0x{magic:04x} is not samepage's")
    if version not in VERSIONS:
        older = "library" if version < min(VERSIONS) else "daemon"
        raise UnsupportedVersionError(
            f"protocol version {version}, and this daemon speaks {min(VERSIONS)} to"
            f" {max(VERSIONS)}: upgrade the {older}"
        )
    if length != len(packet):
        raise ProtocolError(f"the header says {length} bytes, the packet has {len(packet)}")
    try:
        message = Message(Type(kind), seq, arena, packet[HEADER.size :], version)
    except ValueError as error:
        raise ProtocolError(f"unknown message type {kind}") from error
    if version < SINCE.get(message.type, version):
        raise ProtocolError(f"{message.type.name} is not in version {version}")
    return message


def unpack(layout: struct.Struct, message: Message) -> tuple[int, ...]:
    """Return the fields of a payload of exactly one layout.

    Raises:
        ProtocolError: the payload has another size.
    """
    if len(message.payload) != layout.size:
        raise ProtocolError(f"{message.type.name} with {len(message.payload)} bytes of payload")
    return layout.unpack(message.payload)


def unpack_records(dtype: np.dtype[np.void], message: Message) -> npt.NDArray[np.void]:
    """Return the records that make up a whole payload.

    Raises:
        ProtocolError: the payload is no whole number of records.
    """
    if len(message.payload) % dtype.itemsize:
        raise ProtocolError(f"{message.type.name} with {len(message.payload)} bytes of payload")
    return np.frombuffer(message.payload, dtype)


def unpack_outcomes(message: Message) -> tuple[int, npt.NDArray[np.uint8]]:
    """Return a DONE message's error and outcomes.

    Raises:
        ProtocolError: the payload does not hold what it says.
    """
    if len(message.payload) < DONE.size:
        raise ProtocolError("DONE is too short")
    error, count = DONE.unpack_from(message.payload)
    outcomes = np.frombuffer(message.payload, np.uint8, offset=DONE.size)
    if outcomes.size != count or (count and int(outcomes.max()) > max(Outcome)):
        raise ProtocolError("DONE does not hold the outcomes that it says")
    return error, outcomes


def unpack_arena_open(message: Message) -> ArenaOpen:
    """Return what an ARENA_OPEN asks for; name and domain are checked by the caller.

    Raises:
        ProtocolError: the payload does not hold what it says, or is not UTF-8.
    """
    layout = ARENA_OPEN if message.version > 2 else ARENA_OPEN_V2
    if len(message.payload) < layout.size:
        raise ProtocolError("ARENA_OPEN is too short")
    fields = layout.unpack_from(message.payload)
    pages, lock, extents, name_bytes, domain_bytes, *newer = fields
    text = message.payload[layout.size :]
    if len(text) != name_bytes + domain_bytes:
        raise ProtocolError("ARENA_OPEN does not hold the names that it says")
    try:
        name, domain = text[:name_bytes].decode(), text[name_bytes:].decode()
    except UnicodeDecodeError as error:
        raise ProtocolError("ARENA_OPEN with a name that is not UTF-8") from error
    return ArenaOpen(pages, lock, extents, name, domain, *newer)


def pack_arena_opened(lock_or_seed: int, wanted: str, domain: str) -> bytes:
    """Return the payload of ARENA_OPENED, which tells the domain where ARENA_OPEN named none."""
    return ARENA_OPENED.pack(lock_or_seed) + (b"" if wanted else domain.encode())


def pack_arena_open(wanted: ArenaOpen, version: int = VERSION) -> bytes:
    """Return the payload of ARENA_OPEN."""
    name, domain = wanted.name.encode(), wanted.domain.encode()
    fields = (wanted.pages, wanted.lock, wanted.extents, len(name), len(domain))
    if version > 2:
        return ARENA_OPEN.pack(*fields, wanted.away, wanted.left) + name + domain
    return ARENA_OPEN_V2.pack(*fields) + name + domain


@dataclass(frozen=True, slots=True)
class ArenaOpen:
    """The payload of ARENA_OPEN. `pages` in pages; see docs/protocol.md for the rest."""

    pages: int
    lock: int
    extents: int
    name: str
    domain: str
    away: int = 0
    left: bytes = bytes(16)


CLONE_LAZY = 1
CLONE_MIGRATE = 2


@dataclass(frozen=True, slots=True)
class Clone:
    """The payload of CLONE; see docs/protocol.md."""

    lazy: bool
    migrate: bool
    max_freeze_ms: int
    host: str
    source: str
    name: str
    domain: str


def unpack_clone(message: Message) -> Clone:
    """Return what a CLONE asks for; host, names and domain are checked by the caller.

    Raises:
        ProtocolError: the payload does not hold what it says, or is not UTF-8.
    """
    if len(message.payload) < CLONE.size:
        raise ProtocolError("CLONE is too short")
    flags, max_freeze_ms, *lengths = CLONE.unpack_from(message.payload)
    if len(message.payload) != CLONE.size + sum(lengths):
        raise ProtocolError("CLONE does not hold the texts that it says")
    if flags > CLONE_LAZY | CLONE_MIGRATE:
        raise ProtocolError(f"CLONE with flags 0x{flags:x}")
    texts, at = [], CLONE.size
    for length in lengths:
        texts.append(message.payload[at : at + length])
        at += length
    try:
        host, source, name, domain = (text.decode() for text in texts)
    except UnicodeDecodeError as error:
        raise ProtocolError("CLONE with a text that is not UTF-8") from error
    lazy, migrate = bool(flags & CLONE_LAZY), bool(flags & CLONE_MIGRATE)
    return Clone(lazy, migrate, max_freeze_ms, host, source, name, domain)


def pack_clone(wanted: Clone) -> bytes:
    """Return the payload of CLONE."""
    texts = [t.encode() for t in (wanted.host, wanted.source, wanted.name, wanted.domain)]
    flags = CLONE_LAZY * wanted.lazy | CLONE_MIGRATE * wanted.migrate
    lengths = [len(text) for text in texts]
    return CLONE.pack(flags, wanted.max_freeze_ms, *lengths) + b"".join(texts)
