"""The spill files: what was said to be safe is there, whatever happens to merger and disk."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from fakes.fake_merging_agent import random_pages

from samepage.daemon.wire import PAGE_SIZE
from samepage_merger.cluster.away import Bytes, Digests, Mask
from samepage_merger.cluster.spill import Spill
from samepage_merger.view import StoreError

LIMIT = 1 << 30


def digests_of(data: Bytes) -> Digests:
    view = memoryview(data)
    pages = (view[low : low + PAGE_SIZE] for low in range(0, len(view), PAGE_SIZE))
    packed = b"".join(hashlib.sha256(page).digest() for page in pages)
    return np.frombuffer(packed, np.uint8).reshape(-1, 32)


def check(digests: Digests, data: Bytes) -> Mask:
    good: Mask = (digests_of(data) == digests).all(axis=1)
    return good


@pytest.fixture
def spill(tmp_path: Path) -> Iterator[Spill]:
    spill = Spill(tmp_path / "spill", LIMIT)
    yield spill
    spill.close()


async def write(spill: Spill, data: npt.NDArray[np.uint8]) -> list[bool]:
    mask = await spill.write(digests_of(data.tobytes()), data.tobytes())
    return [bool(safe) for safe in mask]


async def read(spill: Spill, data: npt.NDArray[np.uint8]) -> list[bool]:
    """Which of these pages are there; those that are have these bytes."""
    found = await spill.read(digests_of(data.tobytes()), check)
    assert bytes(found.data) == data[found.mask].tobytes()
    return [bool(there) for there in found.mask]


async def drop(spill: Spill, data: npt.NDArray[np.uint8]) -> None:
    wanted = digests_of(data.tobytes())[:, :8].copy().view(np.uint64).reshape(-1)
    keys, locations = spill.entries()
    await spill.drop(locations[np.isin(keys, wanted)])


def files(spill: Spill) -> list[Path]:
    return sorted(spill.path.iterdir())


async def test_pages_come_back_by_their_digests(spill: Spill) -> None:
    data = random_pages(1, 1300)
    assert all(await write(spill, data[:700]))
    assert all(await write(spill, data[700:]))
    shuffled = np.random.default_rng(1).permutation(1300)
    assert all(await read(spill, data[shuffled]))
    assert not any(await read(spill, random_pages(2, 10)))
    assert len(spill) == 1300
    assert 1300 * PAGE_SIZE <= spill.used_bytes <= 1330 * PAGE_SIZE


async def test_equal_pages_are_kept_once(spill: Spill) -> None:
    data = random_pages(1, 10)
    assert all(await write(spill, np.concatenate((data, data[::-1]))))
    assert all(await write(spill, data[3:5]))
    assert len(spill) == spill.counts.written == 10


async def test_what_nobody_needs_gives_its_space_back(spill: Spill) -> None:
    data = random_pages(1, 3000)
    await write(spill, data)
    before = spill.used_bytes
    await drop(spill, data[100:2900])
    assert spill.used_bytes <= before - 2780 * PAGE_SIZE
    assert all(await read(spill, data[:100])) and not any(await read(spill, data[100:2900]))
    assert all(await write(spill, data[100:200]))
    assert all(await read(spill, data[:200]))


async def test_a_restart_finds_all_of_it(spill: Spill, tmp_path: Path) -> None:
    data = random_pages(1, 1000)
    await write(spill, data)
    await drop(spill, data[:400])
    spill.close()
    again = Spill(tmp_path / "spill", LIMIT)
    assert all(await read(again, data[400:]))
    # Holes are hints like any others: nobody is told that their pages are there.
    assert not any(await read(again, data[:400]))
    assert again.counts.bad == 400
    assert all(await write(again, data[300:500]))
    assert all(await read(again, data[300:]))
    again.close()


async def test_segments_without_pages_are_removed(spill: Spill) -> None:
    data = random_pages(1, 512)
    for turn in range(40):
        await write(spill, data ^ np.uint8(turn))
    assert len(files(spill)) == 2
    for turn in range(39):
        await drop(spill, data ^ np.uint8(turn))
    assert len(files(spill)) == 1
    assert all(await read(spill, data ^ np.uint8(39)))


async def test_the_limit_keeps_pages_in_memory(tmp_path: Path) -> None:
    spill = Spill(tmp_path / "spill", 300 * PAGE_SIZE)
    data = random_pages(1, 512)
    safe = await write(spill, data)
    assert 250 < sum(safe) <= 300 and safe == sorted(safe, reverse=True)
    assert await read(spill, data) == safe
    assert spill.counts.no_room == 512 - sum(safe)
    await drop(spill, data[:100])
    assert sum(await write(spill, data)) > sum(safe) - 20
    spill.limit_bytes = LIMIT
    assert all(await write(spill, data))
    spill.close()


@pytest.mark.needs("root")
async def test_a_full_disk_keeps_pages_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(path)], check=True)
    try:
        spill = Spill(path / "spill", LIMIT)
        data = random_pages(1, 2048)
        safe = await write(spill, data)
        assert 400 < sum(safe) < 512
        assert spill.counts.no_room == 2048 - sum(safe)
        assert await read(spill, data) == safe
        await drop(spill, data[: sum(safe) // 2])
        more = await write(spill, data[1000:1100])
        assert all(more) and all(await read(spill, data[1000:1100]))
        spill.close()
        again = Spill(path / "spill", LIMIT)
        assert all(await read(again, data[1000:1100]))
        again.close()
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


async def test_what_was_not_synced_was_not_spilled(
    spill: Spill, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random_pages(1, 100)
    assert all(await write(spill, data[:50]))

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    assert not any(await write(spill, data[50:]))
    monkeypatch.undo()
    assert all(await read(spill, data[:50])) and not any(await read(spill, data[50:]))
    assert all(await write(spill, data[50:])) and all(await read(spill, data))
    assert spill.counts.errors == 1


@pytest.mark.parametrize("keep", [0, 1, 16, 100, PAGE_SIZE, PAGE_SIZE * 5 + 7, PAGE_SIZE * 50])
async def test_a_torn_tail_is_ignored(spill: Spill, tmp_path: Path, keep: int) -> None:
    data = random_pages(1, 200)
    await write(spill, data[:100])
    [file] = files(spill)
    size = file.stat().st_size
    await write(spill, data[100:])
    spill.close()
    os.truncate(file, size + keep)
    again = Spill(tmp_path / "spill", LIMIT)
    assert all(await read(again, data[:100]))
    assert not any(await read(again, data[100:]))
    assert all(await write(again, data)) and all(await read(again, data))
    again.close()


async def test_a_damaged_page_is_not_taken_for_one(spill: Spill) -> None:
    data = random_pages(1, 64)
    await write(spill, data)
    [file] = files(spill)
    with file.open("r+b") as opened:
        opened.seek(-PAGE_SIZE * 10 + 5, os.SEEK_END)
        opened.write(b"damage")
    there = await read(spill, data)
    assert there == [number != 54 for number in range(64)]
    # Whoever spills that page again does not rely on the damaged one.
    assert all(await write(spill, data))
    assert all(await read(spill, data))


def test_one_directory_has_one_merger(spill: Spill, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="another merger"):
        Spill(tmp_path / "spill", LIMIT)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="set spill_dir"):
        Spill(tmp_path / "file", LIMIT)


_SPILLER = """
import asyncio, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from fakes.fake_merging_agent import random_pages
from unit.test_spill import digests_of
from samepage_merger.cluster.spill import Spill

async def main():
    spill = Spill(Path(sys.argv[1]), 1 << 30)
    seed = 0
    while True:
        data = random_pages(seed, 64)
        assert (await spill.write(digests_of(data.tobytes()), data.tobytes())).all()
        print(seed, flush=True)
        if seed % 3 == 2:
            keys, locations = spill.entries()
            doomed = digests_of(random_pages(seed - 2, 64).tobytes())[:, :8].copy().view("<u8")
            import numpy as np
            await spill.drop(locations[np.isin(keys, doomed.reshape(-1))])
        seed += 1

asyncio.run(main())
"""


@pytest.mark.parametrize("after", [0, 3, 7, 12])
async def test_kill_at_any_instant_loses_nothing(tmp_path: Path, after: int) -> None:
    path = tmp_path / "spill"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _SPILLER, str(path), *sys.path, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    said = [int(await process.stdout.readline()) for _ in range(after + 1)]
    process.send_signal(signal.SIGKILL)
    said += [int(line) for line in (await process.stdout.read()).split()]
    await process.wait()
    spill = Spill(path, LIMIT)
    for seed in said:
        if seed % 3 or seed == said[-1]:
            assert all(await read(spill, random_pages(seed, 64)))
    spill.close()
