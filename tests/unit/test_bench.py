"""What benchmarks say of a figure, and the picture of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from matplotlib import image

from bench import picture
from bench.record import Aim, Record, parse, percentile

WITH_PEER = Record("b", "wall", "s", 2.0, 1.0, "peer", 5, Aim("<=", 0.25))
WITHOUT = Record("b", "books", "%", None, 0.4, "", 5, Aim("<=", 0.8))


def test_an_aim_is_of_the_ratio_where_there_is_a_peer() -> None:
    assert WITH_PEER.ratio == 0.5
    assert WITH_PEER.reached is False
    assert dataclasses.replace(WITH_PEER, ours=0.5).reached is True
    assert dataclasses.replace(WITH_PEER, aim=Aim(">=", 0.5)).reached is True
    assert WITHOUT.reached is True


def test_nothing_is_said_without_an_aim_or_when_the_peer_did_not_run() -> None:
    assert dataclasses.replace(WITH_PEER, aim=None).reached is None
    assert dataclasses.replace(WITH_PEER, peer=None).reached is None


def test_lines_hold_everything() -> None:
    for record in (WITH_PEER, WITHOUT):
        line = record.line()
        assert parse(line) == record
        assert json.loads(line)["reached"] == record.reached


def test_percentiles() -> None:
    values = list(range(100, 0, -1))
    assert percentile(values, 0.5) == 51
    assert percentile(values, 0.99) == 100
    assert percentile([7], 0.99) == 7


@pytest.mark.parametrize(("record", "times"), [(WITH_PEER, 0.5), (WITHOUT, 2.0)])
def test_margin_is_how_many_times_better_than_the_aim(record: Record, times: float) -> None:
    assert picture.margin(record) == pytest.approx(times)


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    out = tmp_path / "figures.png"
    picture.draw([WITH_PEER, WITHOUT], out)
    pixels = image.imread(out)
    assert pixels.shape[1] > 1000
    rows = pixels[:, :, :3].reshape(-1, 3).round(2)
    colours = {tuple(colour) for colour in rows.astype(float).round(2).tolist()}
    assert (0.0, 0.62, 0.45) in colours, "the bar of an aim that is reached"
    assert (0.84, 0.37, 0.0) in colours, "the bar of one that is not"
