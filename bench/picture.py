"""The figures of a run as a picture: each beside its aim, on one logarithmic scale.

A bar shows how many times better than its aim a figure is (to the right of the line) or how many
times short of it (to the left), so that ratios, bytes and milliseconds stand beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FixedLocator, FuncFormatter

from bench.record import Record

# From Okabe and Ito's palette for the colour-blind.
_REACHED = "#009E73"
_SHORT = "#D55E00"
_ROW_INCHES = 0.42
_TICKS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
_LEAST, _MOST = _TICKS[0], _TICKS[-1]


def margin(record: Record) -> float:
    """How many times better than its aim the figure is; less than 1: short of it."""
    assert record.aim is not None
    figure = record.ratio if record.ratio is not None else record.ours
    if record.aim.sign == "<=":
        return record.aim.value / figure if figure > 0 else math.inf
    return figure / record.aim.value


def label(record: Record) -> str:
    """The figure in words."""
    peers = "" if record.ratio is None else " x the peer's"
    figure = record.ours if record.ratio is None else record.ratio
    unit = "" if record.ratio is not None else f" {record.unit}"
    return f"{figure:.3g}{unit}{peers} (aim {record.aim})"


def draw(records: Sequence[Record], out: Path) -> None:
    """Write the picture; records without an aim, or whose peer did not run, are left out."""
    shown = [record for record in records if record.reached is not None][::-1]
    height = 1.3 + _ROW_INCHES * len(shown)
    figure, axes = pyplot.subplots(figsize=(11, height), layout="constrained")
    margins = [min(max(margin(record), _LEAST), _MOST) for record in shown]
    colours = [_REACHED if record.reached else _SHORT for record in shown]
    axes.barh(range(len(shown)), [math.log2(each) for each in margins], color=colours, height=0.62)
    axes.axvline(0, color="black", linewidth=1)
    for row, (record, each) in enumerate(zip(shown, margins, strict=True)):
        # on the free side of the line
        side = -1 if each >= 1 else 1
        axes.text(
            0.06 * side,
            row,
            label(record),
            va="center",
            ha="left" if side > 0 else "right",
            fontsize=8,
        )
    axes.set_yticks(range(len(shown)), [record.what for record in shown], fontsize=8)
    axes.set_xlim(math.log2(_LEAST) - 0.1, math.log2(_MOST) + 0.1)
    axes.xaxis.set_major_locator(FixedLocator([math.log2(tick) for tick in _TICKS]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{2**at:g} x"))
    axes.set_xlabel("times better than the aim (right) or short of it (left)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(out, dpi=130)
    pyplot.close(figure)
