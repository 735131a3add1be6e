"""Random programs over arenas, and the naive model of what must come of them.

The model is bytes in a dictionary. Of sharing it knows only what a user is told:
- a page that was written, unshared or closed is private;
- after share(), every page with an equal page in its domain, in whatever arena, is shared, zero
  pages excepted (they are the kernel's), and no page is that has neither an equal one nor was
  shared before (its equals may have gone).
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import strategies as st

PAGE = 4096
PAGES_MAX = 40
DOMAINS = ("default", "other")
PROCESSES = 3

ZEROS = bytes(PAGE)

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Create:
    """A new arena in one of the processes."""

    process: int
    domain: int
    pages: int


@dataclass(frozen=True)
class Write:
    """Pages from `page` on get the bytes of `pattern`, `pattern` + 1, ...; 0: zeros."""

    arena: int
    page: int
    count: int
    pattern: int


@dataclass(frozen=True)
class Poke:
    """A few bytes of one page."""

    arena: int
    page: int
    offset: int
    value: int


@dataclass(frozen=True)
class Share:
    """arena.share()."""

    arena: int


@dataclass(frozen=True)
class Unshare:
    """arena.unshare()."""

    arena: int


@dataclass(frozen=True)
class Discard:
    """arena.discard() of pages, which read as zeros then."""

    arena: int
    page: int
    count: int


@dataclass(frozen=True)
class Seal:
    """arena.seal(): later steps that would write to it do nothing."""

    arena: int


@dataclass(frozen=True)
class Fork:
    """The arena's process forks, and writes a page while its child lives."""

    arena: int
    page: int


@dataclass(frozen=True)
class Close:
    """arena.close()."""

    arena: int


@dataclass(frozen=True)
class KillProcess:
    """kill -9 of a process with all its arenas."""

    process: int


@dataclass(frozen=True)
class KillDaemon:
    """kill -9 of the merger or the scanner, which comes back."""

    daemon: str


Step = (
    Create
    | Write
    | Poke
    | Share
    | Unshare
    | Discard
    | Seal
    | Fork
    | Close
    | KillProcess
    | KillDaemon
)

_arenas = st.integers(0, 7)
_pages = st.integers(0, PAGES_MAX - 1)
_creates = st.builds(
    Create, st.integers(0, PROCESSES - 1), st.sampled_from((0, 0, 0, 1)), st.integers(1, PAGES_MAX)
)
_writes = st.builds(
    Write,
    _arenas,
    _pages,
    st.integers(1, PAGES_MAX),
    st.sampled_from((100, 100, 110, 200, 0, 300)),
)
_pokes = st.builds(Poke, _arenas, _pages, st.integers(0, PAGE - 8), st.integers(0, 2**64 - 1))
_shares = st.builds(Share, _arenas)
_common = st.one_of(
    _creates,
    _writes,
    _writes,
    _pokes,
    _shares,
    _shares,
    st.builds(Unshare, _arenas),
    st.builds(Discard, _arenas, _pages, st.integers(1, PAGES_MAX)),
    st.builds(Seal, _arenas),
    st.builds(Fork, _arenas, _pages),
    st.builds(Close, _arenas),
)
_rare = st.one_of(
    st.builds(KillProcess, st.integers(0, PROCESSES - 1)),
    st.builds(KillDaemon, st.sampled_from(("merger", "scanner"))),
)


@st.composite
def programs(draw: st.DrawFn) -> list[Step]:
    """Some arenas with something in them, and what happens to them; few programs kill, since that
    takes long."""
    program: list[Step] = []
    for number in range(draw(st.integers(2, 4))):
        program.append(draw(_creates))
        program.append(Write(number, 0, PAGES_MAX, draw(st.sampled_from((100, 100, 110)))))
    program += draw(st.lists(_common, min_size=8, max_size=24))
    if draw(st.sampled_from((False,) * 11 + (True,))):
        program.append(draw(_rare))
        program += draw(st.lists(_common, min_size=2, max_size=6))
    return program


def pattern(number: int) -> bytes:
    """The bytes of a page; zeros for 0."""
    return random.Random(number).randbytes(PAGE) if number else ZEROS


@dataclass
class ModelArena:
    """What an arena must hold.

    Attributes:
        pages: the bytes of each.
        may: pages that may be shared.
        sealed: it can only be read.
    """

    name: str
    process: int
    domain: str
    pages: list[bytes]
    may: set[int] = field(default_factory=set)
    sealed: bool = False

    def write(self, page: int, data: bytes) -> None:
        """A page has these bytes now, and is private."""
        self.pages[page] = data
        self.may.discard(page)


@dataclass
class Model:
    """All arenas, in the order in which they were made."""

    arenas: list[ModelArena] = field(default_factory=list)

    def create(self, process: int, domain: str, pages: int) -> ModelArena:
        """A new arena, all zero."""
        # never a name twice: a process that was killed may not have let go of its own yet
        arena = ModelArena(f"arena-{next(_numbers)}", process, domain, [ZEROS] * pages)
        self.arenas.append(arena)
        return arena

    def pick(self, number: int) -> ModelArena | None:
        """The arena that a step means; None when there is none."""
        return self.arenas[number % len(self.arenas)] if self.arenas else None

    def shared(self, domain: str) -> None:
        """share() was called for an arena of the domain."""
        for arena in self.arenas:
            if arena.domain == domain:
                arena.may |= self.must(arena)

    def must(self, arena: ModelArena) -> set[int]:
        """Pages of an arena that are shared after share()."""
        counts = Counter(
            data for each in self.arenas if each.domain == arena.domain for data in each.pages
        )
        return {page for page, data in enumerate(arena.pages) if data != ZEROS and counts[data] > 1}
