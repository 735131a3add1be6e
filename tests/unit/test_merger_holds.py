"""Holds against a naive model, over restarts and clocks that go on."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from samepage_merger.books import Books
from samepage_merger.cluster.catalog import Catalog
from samepage_merger.cluster.digests import Digester
from samepage_merger.cluster.holdfile import HoldFile, Kind, Record
from samepage_merger.cluster.holds import HELD, Holds, SlotSet
from samepage_merger.cluster.keys import Keys
from samepage_merger.runs import Int64s
from samepage_merger.store import Store, StoreFullError

OWNERS = ("host-a", "host-b")
SNAPSHOTS = (HELD, b"s" * 16, b"t" * 16)
PAGES = 60

leases = st.tuples(st.sampled_from(OWNERS), st.sampled_from(SNAPSHOTS))


def keys_for(slots: Int64s) -> Keys:
    """A key that tells which slot it is of."""
    return slots.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


class Merger:
    """What one life of a merger knows of a domain."""

    def __init__(self, path: Path, slots: int, clock: list[float]) -> None:
        self.books = Books()
        self.freed: set[int] = set()
        store = Store.__new__(Store)
        self.catalog = Catalog(self.books, store, Digester(bytes(32)), self._free)
        file = HoldFile(path)
        self.holds = Holds(self.books, self.catalog, file, self._free, lambda: clock[0])
        self.holds.restore(slots)
        self.map = self.books.open(PAGES)

    def _free(self, slots: Int64s) -> None:
        assert slots.tolist() == sorted(set(slots.tolist()))
        self.freed |= set(slots.tolist())

    def add(self, first: int, count: int) -> None:
        """New slots that pages map."""
        slots = np.arange(first, first + count)
        hold = self.books.add(slots)
        pages = np.flatnonzero(self.map.slots(np.arange(PAGES)) == 0)[:count]
        self._free(self.books.map(self.map, pages, slots[: pages.size]))
        self._free(self.books.release(hold))


class HoldsModel(RuleBasedStateMachine):
    """The same with sets."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="samepage-test-"))
        self.clock = [1000.0]
        self.slots = 1
        self.merger = Merger(self.folder / "holds", 1, self.clock)
        self.held: dict[tuple[str, bytes], set[int]] = {}
        self.expires: dict[tuple[str, bytes], float] = {}

    def teardown(self) -> None:
        self.merger.holds.close()
        shutil.rmtree(self.folder)

    @property
    def mapped(self) -> set[int]:
        return set(self.merger.map.slots(self.merger.map.mapped()).tolist())

    @property
    def live(self) -> set[int]:
        return self.mapped.union(*self.held.values())

    @rule(count=st.integers(1, 20))
    def add(self, count: int) -> None:
        self.merger.add(self.slots, count)
        self.slots += count

    @rule(name=leases, seconds=st.integers(1, 50))
    def extend(self, name: tuple[str, bytes], seconds: int) -> None:
        self.merger.holds.extend(name[0], seconds, name[1])
        self.held.setdefault(name, set())
        self.expires[name] = max(self.expires.get(name, 0), self.clock[0] + seconds)

    @precondition(lambda self: self.live and self.held)
    @rule(data=st.data())
    def grant(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        some = data.draw(st.lists(st.sampled_from(sorted(self.live)), min_size=1, max_size=12))
        lease = self.merger.holds.lease(*name)
        if lease is None:
            assert self.expires[name] <= self.clock[0]
            return
        slots = np.array(some, np.int64)
        self.merger.holds.grant(lease, keys_for(slots), slots)
        self.held[name] |= set(some)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        some = data.draw(st.sets(st.integers(1, self.slots), max_size=20))
        lease = self.merger.holds.lease(*name)
        if lease is not None:
            self.merger.holds.release(lease, np.array(sorted(some), np.int64))
            self.held[name] -= some

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        lease = self.merger.holds.lease(*name)
        if lease is not None:
            self.merger.holds.end(lease)
            del self.held[name], self.expires[name]

    @precondition(lambda self: any(name[1] != HELD for name in self.held))
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(n for n in self.held if n[1] != HELD)))
        lease = self.merger.holds.snapshot(name[1]) and self.merger.holds.lease(*name)
        if lease is None:
            return
        self.merger.holds.keep(lease)
        own = name[0], HELD
        self.held[own] = self.held.get(own, set()) | self.held.pop(name)
        self.expires[own] = max(self.expires.get(own, 0), self.expires.pop(name))

    @precondition(lambda self: self.mapped)
    @rule(first=st.integers(0, PAGES - 1), count=st.integers(1, PAGES))
    def unmap(self, first: int, count: int) -> None:
        pages = self.merger.map.mapped(first, min(count, PAGES - first))
        self.merger._free(self.merger.books.unmap(self.merger.map, pages))

    @rule(seconds=st.integers(0, 30))
    def time_passes(self, seconds: int) -> None:
        self.clock[0] += seconds
        self.merger.holds.expire()
        for name in [name for name, end in self.expires.items() if end <= self.clock[0]]:
            del self.held[name], self.expires[name]

    @rule(torn=st.integers(0, 30))
    def restart(self, torn: int) -> None:
        """The merger is killed, perhaps in the middle of a write, and the pages' process too."""
        self.merger.holds.close()
        path = self.folder / "holds"
        if path.exists():
            entries = np.zeros(9, "<u8,<i8")
            record = Record(Kind.GRANT, "host-a", entries=entries).pack()
            with path.open("ab") as file:
                file.write(record[: min(torn, len(record) - 1)])
        self.merger = Merger(path, self.slots, self.clock)

    @invariant()
    def agrees(self) -> None:
        merger = self.merger
        assert {(lease.owner, lease.snapshot) for lease in merger.holds} == set(self.held)
        for lease in merger.holds:
            name = lease.owner, lease.snapshot
            assert lease.slots.all().tolist() == sorted(self.held[name])
            assert lease.expires == self.expires[name]
        assert len(merger.holds) == sum(map(len, self.held.values()))
        live = sorted(self.live)
        assert merger.books.table.live().tolist() == live
        assert not merger.freed & self.live
        references = Counter(merger.map.slots(merger.map.mapped()).tolist())
        counted = merger.books.table.references(np.array(live, np.int64)).tolist()
        assert counted == [references[slot] for slot in live]
        held = np.array(sorted(set().union(*self.held.values())), np.int64)
        assert merger.catalog.look_up_keys(keys_for(held)).tolist() == held.tolist()


HoldsModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestHolds = HoldsModel.TestCase


def test_set_of_slots() -> None:
    slots = SlotSet()
    for first in (1, 400, 90, 20):
        slots.add(np.arange(first, first + 17))
    slots.remove(np.array([5, 95, 9999]))
    expected = {n for first in (1, 400, 90, 20) for n in range(first, first + 17)} - {5, 95}
    assert slots.all().tolist() == sorted(expected)
    assert len(slots) == len(expected)
    asked = np.arange(500)
    assert np.flatnonzero(slots.contains(asked)).tolist() == sorted(expected)


def test_file_is_written_anew_when_most_of_it_is_over(tmp_path: Path) -> None:
    merger = Merger(tmp_path / "holds", 1, [0.0])
    merger.add(1, 50)
    slots = np.arange(1, 51)
    for number in range(4000):
        lease = merger.holds.extend("host-a", 100.0, number.to_bytes(16, "big"))
        merger.holds.grant(lease, keys_for(slots), slots)
        merger.holds.end(lease)
    lease = merger.holds.extend("host-b", 50.0)
    merger.holds.grant(lease, keys_for(slots), slots)
    assert os.path.getsize(tmp_path / "holds") < 2 << 20
    merger.holds.close()
    again = Merger(tmp_path / "holds", 51, [0.0])
    assert [(each.owner, len(each.slots)) for each in again.holds] == [("host-b", 50)]
    again.holds.close()


def test_no_room_for_the_note_is_no_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merger = Merger(tmp_path / "holds", 1, [0.0])
    merger.add(1, 10)
    lease = merger.holds.extend("host-a", 100.0)
    slots = np.arange(1, 11)

    def full(fd: int, data: bytes) -> int:
        return real(fd, data[:30])

    real = os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(StoreFullError):
            merger.holds.grant(lease, keys_for(slots), slots)
    assert len(merger.holds) == 0
    merger.holds.grant(lease, keys_for(slots), slots)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        merger.holds.release(lease, slots)
    assert len(merger.holds) == 10
    merger.holds.close()
    again = Merger(tmp_path / "holds", 11, [0.0])
    assert len(again.holds) == 10
    again.holds.close()
