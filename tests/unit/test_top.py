"""`samepage top` on terminals of any size, with names of any kind."""

from __future__ import annotations

import datetime
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from samepage.cli.places import Host
from samepage.cli.top.screen import Screen, fit
from samepage.cli.top.snapshot import HostSnapshot, Snapshot
from samepage.reports import ArenaAccount, DomainAccount, HostAccount, ProcessAccount, total


@given(st.lists(st.integers(0, 30), max_size=5), st.integers(-5, 60))
def test_rows_fit_and_no_room_is_wasted(counts: list[int], lines: int) -> None:
    shown = fit(counts, lines)
    used = sum(rows + 2 for rows in shown if rows)
    assert used <= max(lines, 0)
    assert all(rows <= count for rows, count in zip(shown, counts, strict=True))
    began = [bool(rows) for rows, count in zip(shown, counts, strict=True) if count]
    assert began == sorted(began, reverse=True), "the first come first"
    if all(began) and shown != counts:
        assert used == lines


def test_tables_grow_alike() -> None:
    assert fit([50, 3, 50], 3 * 2 + 15) == [6, 3, 6]


def arena(number: int, name: str, pid: int = 0) -> ArenaAccount:
    return ArenaAccount(
        name=name,
        domain="books",
        agent=f"{number:032x}",
        pid=pid,
        command="python",
        pages=100 * number,
        private_pages=10 * number,
        shared_pages=90 * number,
        proportional_bytes=45 * number * 4096,
        saved_bytes=45 * number * 4096,
    )


def snapshot(hosts: int, arenas: list[ArenaAccount]) -> Snapshot:
    process = ProcessAccount(
        **total(arenas), pid=0, agent="ab" * 16, command="", arenas=len(arenas)
    )
    domain = DomainAccount(
        **total(arenas), name="books", arenas=len(arenas), store_bytes=0, unattributed_bytes=0
    )
    account = HostAccount(
        **total(arenas),
        node="host-a",
        store_bytes=0,
        unattributed_bytes=0,
        domains=(domain,),
        processes=(process,),
        arenas=tuple(arenas),
    )
    return Snapshot(
        datetime.datetime(2030, 1, 2, 3, 4, 5, tzinfo=datetime.UTC),
        0.0,
        tuple(
            HostSnapshot(Host(f"host-{number}", Path("/")), account, None, None)
            for number in range(hosts)
        ),
        ("the scanner is away",),
    )


def printed(screen: Screen, width: int, height: int) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, legacy_windows=False)
    console.print(screen)
    return out.getvalue().splitlines()


def test_what_saves_most_comes_first() -> None:
    told = snapshot(1, [arena(number, f"arena-{number}", 7) for number in (1, 3, 2)])
    lines = printed(Screen(told, None, limited=False), 120, 10)
    rows = [line.split()[1] for line in lines if line.startswith("books") and "arena-" in line]
    assert rows == ["arena-3", "arena-2", "arena-1"]
    assert lines[1] == "away: the scanner is away"
    assert any("agent abababab" in line for line in lines)


@pytest.mark.parametrize(("width", "height"), [(120, 40), (80, 24), (40, 12), (20, 6), (5, 2)])
@pytest.mark.parametrize("hosts", [1, 20])
def test_it_never_scrolls(width: int, height: int, hosts: int) -> None:
    told = snapshot(hosts, [arena(number, f"arena-{number}" * 5) for number in range(100)])
    lines = printed(Screen(told, None, limited=True), width, height)
    assert len(lines) <= max(height, 2)
    assert max(map(len, lines)) <= width
    if height >= 12:
        assert any("of 100" in line or "of 2000" in line for line in lines)


def test_narrow_terminals_get_fewer_columns() -> None:
    told = snapshot(1, [arena(1, "a")])
    assert any("private" in line for line in printed(Screen(told, None, limited=False), 120, 40))
    narrow = printed(Screen(told, None, limited=False), 70, 40)
    assert not any("private" in line for line in narrow)
    assert any("saved" in line for line in narrow)


def test_names_are_no_markup() -> None:
    told = snapshot(1, [arena(1, "[red]a[bold]")])
    lines = printed(Screen(told, None, limited=False), 120, 40)
    assert any("[red]a[bold]" in line for line in lines)


def test_one_domain() -> None:
    told = snapshot(1, [arena(1, "a")])
    assert any(" a " in line for line in printed(Screen(told, "books", limited=False), 120, 40))
    assert len(printed(Screen(told, "other", limited=False), 120, 40)) == 2
