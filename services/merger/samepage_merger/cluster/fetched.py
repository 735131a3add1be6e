"""The answers of Pages.Fetch on the wire: as protobuf has them, but made and read without it.

Protobuf copies what a field holds when the field is set, when the message is made and when it is
parsed, and once more at every look at it; here pages are sent from where they are, or copied once
into a message of gRPC's, and are looked at where they came in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from samepage.v1 import pages_pb2
from samepage_merger.cluster.away import Bytes

METHOD = "/samepage.v1.Pages/Fetch"

_FOUND = pages_pb2.FetchResponse.DESCRIPTOR.fields_by_name["found"].number << 3 | 2
_PAGES = pages_pb2.FetchResponse.DESCRIPTOR.fields_by_name["pages"].number << 3 | 2


@dataclass(frozen=True, slots=True)
class Fetched:
    """What FetchResponse says.

    Attributes:
        pages: the pages found, in order.
    """

    found: bytes
    pages: memoryview


def pack(found: bytes, parts: Sequence[Bytes]) -> list[Bytes]:
    """Return a FetchResponse whose pages are in parts, in parts too."""
    size = sum(len(part) for part in parts)
    head = bytes([_FOUND]) + _varint(len(found)) + found + bytes([_PAGES]) + _varint(size)
    return [head, *parts]


def parse(message: Bytes) -> Fetched:
    """Return what a FetchResponse says.

    Raises:
        DecodeError: it is none.
    """
    fields = {_FOUND: memoryview(b""), _PAGES: memoryview(b"")}
    view, at = memoryview(message), 0
    while at < len(view):
        tag = view[at]
        size, at = _read_varint(view, at + 1)
        if tag not in fields or at + size > len(view):
            # Something that this version does not know, or nothing at all: protobuf can tell.
            response = pages_pb2.FetchResponse.FromString(bytes(message))
            return Fetched(response.found, memoryview(response.pages))
        fields[tag] = view[at : at + size]
        at += size
    return Fetched(bytes(fields[_FOUND]), fields[_PAGES])


def _varint(number: int) -> bytes:
    packed = bytearray()
    while number > 0x7F:
        packed.append(number & 0x7F | 0x80)
        number >>= 7
    packed.append(number)
    return bytes(packed)


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    """Return a number, and where what follows begins."""
    number = shift = 0
    for byte in view[at : at + 10]:
        at += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return number, at
