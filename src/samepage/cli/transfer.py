"""What `clone` and `migrate` share: which arena, to which host, and how far it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from samepage import rpc
from samepage.cli import places
from samepage.cli.output import console, messages, print_json
from samepage.errors import InvalidArgumentError, SamepageError
from samepage.sizes import format_size
from samepage.v1 import arenas_pb2, arenas_pb2_grpc

Stub = arenas_pb2_grpc.ArenasStub


class Responses(Protocol):
    """A call whose responses come one after the other."""

    def __iter__(self) -> Iterator[arenas_pb2.CloneArenaResponse]: ...

    def cancel(self) -> bool:
        """End it, at the other side too."""


Call = Callable[[Stub], Responses]


@dataclass(frozen=True)
class Transferred:
    """An arena that has come, and how many of its bytes were here already, came, and are to come.

    Attributes:
        freeze_microseconds: how long its writers had to wait.
    """

    host: str
    domain: str
    arena: str
    size: int
    local_bytes: int
    fetched_bytes: int
    missing_bytes: int
    freeze_microseconds: int


def split(source: str) -> tuple[str, str]:
    """Return the host and the name in "host/name".

    Raises:
        InvalidArgumentError: it is something else.
    """
    host, slash, name = source.partition("/")
    if not (slash and host and name):
        raise InvalidArgumentError(f"{source!r} names no arena of a host: write HOST/ARENA")
    return host, name


def transfer(
    hosts: Iterable[places.Host], source: str, to: str, call: Call, *, quiet: bool
) -> Transferred:
    """Have the helper of host `to` bring an arena there, and show how far it is unless `quiet`.

    Raises:
        NotFoundError: there is no such host or arena.
        InvalidArgumentError: source and destination are one host.
        SamepageError: it came to nothing; the text says why.
    """
    if split(source)[0] == to:
        raise InvalidArgumentError(f"{source} is on {to} already: name another host with --to")
    (host,) = places.named(tuple(hosts), to)
    last: arenas_pb2.CloneArenaResponse | None = None
    with (
        rpc.channel(rpc.socket_address(host.directory, rpc.ARENAS_SOCKET)) as channel,
        _shown(source, quiet) as show,
    ):
        for last in _cancelled_at_the_end(call(Stub(channel))):
            show(last)
    if last is None or not last.HasField("arena"):
        raise SamepageError(f"{host.name}: the answer ended before the arena was there: try again")
    return Transferred(
        host.name,
        last.arena.domain,
        last.arena.arena,
        last.arena.size,
        last.local_bytes,
        last.fetched_bytes,
        last.missing_bytes,
        last.freeze_microseconds,
    )


def print_transferred(done: Transferred, json: bool) -> None:
    """Print what has come, for people or programs."""
    if json:
        print_json(asdict(done))
        return
    parts = [
        f"{format_size(done.local_bytes)} were there already",
        f"{format_size(done.fetched_bytes)} fetched",
    ]
    if done.missing_bytes:
        parts.append(f"{format_size(done.missing_bytes)} to come")
    if done.freeze_microseconds:
        parts.append(f"writers waited {done.freeze_microseconds / 1000:.1f} ms")
    text = f"{done.host}/{done.arena}: {format_size(done.size)}, {', '.join(parts)}"
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def _shown(source: str, quiet: bool) -> Iterator[Callable[[arenas_pb2.CloneArenaResponse], None]]:
    if quiet:
        yield lambda response: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=messages, transient=True) as progress:
        task = progress.add_task(source, total=None, counts="asking")

        def show(response: arenas_pb2.CloneArenaResponse) -> None:
            local, fetched = response.local_bytes, response.fetched_bytes
            missing = response.missing_bytes
            progress.update(
                task,
                total=local + fetched + missing,
                completed=local + fetched,
                counts=f"{format_size(local)} mapped, {format_size(fetched)} fetched, "
                f"{format_size(missing)} missing",
            )

        yield show


def _cancelled_at_the_end(responses: Responses) -> Iterator[arenas_pb2.CloneArenaResponse]:
    """Pass responses on; a Ctrl-C in between ends the call at the other side too."""
    try:
        yield from responses
    finally:
        responses.cancel()
