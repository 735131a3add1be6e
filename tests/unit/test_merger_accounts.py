"""Splitting slots among those who map them: every byte has one owner, and each its fair part."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samepage import accounts
from samepage.errors import ServiceUnavailableError
from samepage.reports import ACCOUNT_FIELDS, ArenaAccount, DomainAccount, HostAccount, total
from samepage_merger.accounts import by_process, command_of, split_slots

PAGE = 4096

# By arena, the slot of each shared page; a slot may be mapped often, by one arena or many.
MAPS = st.lists(st.lists(st.integers(1, 50) | st.integers(2**32, 2**32 + 9)), max_size=12)


def split(maps: list[list[int]]) -> list[int]:
    counts = Counter(slot for slots in maps for slot in slots)
    live = np.array(sorted(counts), np.int64)
    references = np.array([counts[slot] for slot in sorted(counts)], np.int32)
    return split_slots(live, references, [np.array(slots, np.int64) for slots in maps])


@given(MAPS)
def test_the_parts_add_up_to_the_slots(maps: list[list[int]]) -> None:
    slots = {slot for slots in maps for slot in slots}
    assert sum(split(maps)) == len(slots) * PAGE


@given(MAPS)
def test_every_part_is_fair_to_a_byte_a_page(maps: list[list[int]]) -> None:
    counts = Counter(slot for slots in maps for slot in slots)
    for slots, part in zip(maps, split(maps), strict=True):
        exact = sum((Fraction(PAGE, counts[slot]) for slot in slots), Fraction())
        assert abs(part - exact) <= len(slots)


@given(MAPS, st.integers(1, 5))
def test_dead_slots_change_nothing(maps: list[list[int]], dead: int) -> None:
    counts = Counter(slot for slots in maps for slot in slots)
    live = sorted([*counts, *range(100, 100 + dead)])
    references = np.array([counts.get(slot, -1) for slot in live], np.int32)
    arenas = [np.array(slots, np.int64) for slots in maps]
    assert split_slots(np.array(live, np.int64), references, arenas) == split(maps)


@pytest.mark.parametrize("sharers", [2, 3, 5, 7, 100, 4096])
def test_no_arena_is_lucky_over_many_slots(sharers: int) -> None:
    slots = list(range(1, 4201))
    parts = split([slots] * sharers)
    assert sum(parts) == len(slots) * PAGE
    assert max(parts) - min(parts) <= sharers


def test_more_sharers_than_bytes() -> None:
    parts = split([[7]] * 5000)
    assert sorted(parts) == [0] * 904 + [1] * 4096


def arena(name: str, agent: str, pid: int, **numbers: int) -> ArenaAccount:
    return ArenaAccount(name=name, domain="default", agent=agent, pid=pid, command="app", **numbers)


def test_processes_are_told_apart_by_pid_and_without_one_by_agent() -> None:
    arenas = [
        arena("a", "11" * 16, 40, pages=5, saved_bytes=1),
        arena("b", "22" * 16, 40, pages=6, saved_bytes=2),
        arena("c", "33" * 16, 0, pages=7, saved_bytes=3),
        arena("d", "44" * 16, 0, pages=8, saved_bytes=4),
        arena("e", "44" * 16, 0, pages=9, saved_bytes=5),
    ]
    processes = by_process(arenas)
    assert [(p.pid, p.agent, p.arenas, p.pages, p.saved_bytes) for p in processes] == [
        (0, "33" * 16, 1, 7, 3),
        (0, "44" * 16, 2, 17, 9),
        (40, "", 2, 11, 3),
    ]
    assert total(processes) == total(arenas)


ACCOUNTS = st.fixed_dictionaries({name: st.integers(0, 2**40) for name in ACCOUNT_FIELDS})
ARENAS = st.builds(
    lambda numbers, name, agent, pid: arena(name, agent.hex(), pid, **numbers),
    ACCOUNTS,
    st.text(min_size=1, max_size=20),
    st.binary(min_size=16, max_size=16),
    st.integers(0, 3),
)


def host_of(arenas: list[ArenaAccount]) -> HostAccount:
    domain = DomainAccount(
        **total(arenas), name="default", arenas=len(arenas), store_bytes=9, unattributed_bytes=-3
    )
    return HostAccount(
        **total(arenas),
        node="host-a",
        store_bytes=9,
        unattributed_bytes=-3,
        domains=(domain,),
        processes=tuple(by_process(arenas)),
        arenas=tuple(arenas),
    )


@given(st.lists(ARENAS, max_size=5))
def test_accounts_travel_whole(arenas: list[ArenaAccount]) -> None:
    host = host_of(arenas)
    assert accounts.unpack(accounts.pack(host)) == host


def test_many_arenas_travel_in_several_messages() -> None:
    host = host_of([arena(f"arena-{n}", "55" * 16, n, pages=n) for n in range(2500)])
    responses = list(accounts.pack(host))
    assert max(response.ByteSize() for response in responses) < 2**20
    assert len(responses) == 3 + 3 + 1 + 1
    assert accounts.unpack(iter(responses)) == host
    with pytest.raises(ServiceUnavailableError, match="too early"):
        accounts.unpack(responses[:-1])


def test_the_name_of_a_process() -> None:
    assert command_of(0) == command_of(2**22 + 1) == ""
    assert command_of(1) != ""
