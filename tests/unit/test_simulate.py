"""The simulation of a cluster agrees with what can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.simulate import RUNS_FILE, Cluster, Runs, Workload, evictable, read_runs, simulate


def test_all_is_found_without_sampling() -> None:
    assert read_runs(RUNS_FILE).found(0) == 1.0


@pytest.mark.parametrize("bits", [1, 4, 6, 10])
def test_the_share_that_sampling_finds_is_what_drawing_finds(bits: int) -> None:
    runs = read_runs(RUNS_FILE)
    drawn = runs.sampled(np.random.default_rng(1), bits, 400_000)
    assert drawn == pytest.approx(runs.found(bits), abs=0.03)


def test_single_pages_are_found_as_often_as_they_are_published() -> None:
    assert Runs({1: 100}).found(3) == pytest.approx(1 / 8)


def test_hosts_hold_what_fits_and_nothing_twice() -> None:
    workload = Workload(host_gib=8, objects=500)
    cluster = Cluster(workload, 20, np.random.default_rng(1))
    room = workload.host_gib * (1 << 30) / 4096
    assert (cluster.host_pages <= room).all()
    pairs = list(zip(cluster.host_of.tolist(), cluster.object_of.tolist(), strict=True))
    assert len(pairs) == len(set(pairs))
    assert cluster.holders.sum() == len(pairs)


def test_what_only_its_holders_have_cannot_be_evicted() -> None:
    workload = Workload(host_gib=8, objects=500)
    cluster = Cluster(workload, 20, np.random.default_rng(1))
    shares = [evictable(cluster, workload, holders) for holders in (1, 2, 5, 20)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == 0
    assert 0 < shares[0] < workload.cold


def test_points_repeat_and_scale() -> None:
    runs = read_runs(RUNS_FILE)
    points = list(simulate(Workload(host_gib=4), runs, (10, 100), (0, 4), 2, seed=3))
    assert points == list(simulate(Workload(host_gib=4), runs, (10, 100), (0, 4), 2, seed=3))
    by = {(p.hosts, p.sampling_bits): p for p in points}
    assert by[10, 4].entries == pytest.approx(by[10, 0].entries / 16, rel=0.01)
    assert by[100, 0].entries == pytest.approx(10 * by[10, 0].entries, rel=0.5)
    assert by[100, 0].moved_placed < by[100, 0].moved_random <= 1


@pytest.mark.parametrize("text", ["{}", '{"0": 5}', '{"1": -1}', '{"1": 0}', '{"a": 1}'])
def test_bad_distributions(tmp_path: Path, text: str) -> None:
    file = tmp_path / "runs.json"
    file.write_text(text)
    with pytest.raises(ValueError):
        read_runs(file)
