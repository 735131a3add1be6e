"""Messages of Fetch that are made and read by hand: they are what protobuf would make and read."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError

from samepage.v1.pages_pb2 import FetchResponse
from samepage_merger.cluster import fetched


@pytest.mark.parametrize("found", [b"", b"\0", b"\1\0" * 128])
@pytest.mark.parametrize("parts", [[], [b"a" * 127], [b"a" * 100, memoryview(b"b" * 100_000)]])
def test_messages_are_protobuf(found: bytes, parts: list[bytes | memoryview]) -> None:
    pages = b"".join(parts)
    packed = b"".join(fetched.pack(found, parts))
    assert FetchResponse.FromString(packed) == FetchResponse(found=found, pages=pages)
    for message in (packed, FetchResponse(found=found, pages=pages).SerializeToString()):
        parsed = fetched.parse(message)
        assert (parsed.found, bytes(parsed.pages)) == (found, pages)


def test_fields_of_a_later_version_are_passed_over() -> None:
    # Field 9, a number.
    parsed = fetched.parse(b"\x48\x01" + b"".join(fetched.pack(b"\1", [b"page"])))
    assert (parsed.found, bytes(parsed.pages)) == (b"\1", b"page")


@pytest.mark.parametrize("cut", [1, 5, 200])
def test_messages_that_are_cut_off_are_refused(cut: int) -> None:
    message = b"".join(fetched.pack(b"\1\0", [b"a" * 300]))
    with pytest.raises(DecodeError):
        fetched.parse(message[:-cut])
