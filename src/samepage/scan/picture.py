"""Where duplicates are, as a picture: a strip a process by address, and the lengths of runs."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from samepage.scan.compare import Comparison, Kind, Report
from samepage.scan.memory import PAGE, Pages
from samepage.sizes import format_size

_STRIPS_MAX = 40
_COLUMNS = 1200
# From Okabe and Ito's palette for the colour-blind.
_COLOURS = {
    Kind.UNIQUE: ("#BBBBBB", "unique"),
    Kind.SAME_HOST: ("#0072B2", "equal to other processes'"),
    Kind.SAME_PROCESS: ("#E69F00", "equal within the process"),
    Kind.ZERO: ("#009E73", "only zeros"),
    Kind.ONE_ALREADY: ("#CC79A7", "one page already"),
}


def draw(pages: Pages, found: Comparison, report: Report, out: Path) -> None:
    """Write the picture, .png or .svg by its name. Of many processes the largest are shown."""
    pids = np.array([mapping.pid for mapping in pages.mappings] or [0])[pages.mapping]
    owners, counts = np.unique(pids, return_counts=True)
    shown = owners[np.argsort(-counts, kind="stable")][:_STRIPS_MAX]
    height = 2.9 + 0.36 * max(len(shown), 1)
    figure, (upper, lower) = pyplot.subplots(
        2,
        1,
        figsize=(11, height + 2.2),
        height_ratios=(max(height - 1.6, 1), 2.6),
        layout="constrained",
    )
    widest = int(counts.max()) if counts.size else 1
    for row, pid in enumerate(shown.tolist()):
        _strip(upper, row, found.kinds[pids == pid], widest)
    _label_strips(upper, pages, shown.tolist(), report)
    _runs(lower, report)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def _strip(axes: Axes, row: int, kinds: npt.NDArray[np.uint8], widest: int) -> None:
    """One process: its pages by address, as wide as it is large; mixed columns show shares."""
    columns = max(1, round(_COLUMNS * len(kinds) / widest))
    edges = np.unique(np.linspace(0, len(kinds), columns + 1).astype(np.int64))
    starts, widths = edges[:-1], np.diff(edges)
    x = edges * PAGE / (1 << 20)
    bottom = np.full(len(edges), row - 0.4)
    for kind, (colour, _) in _COLOURS.items():
        part = np.add.reduceat((kinds == kind).astype(np.float64), starts) / widths * 0.8
        top = bottom + np.append(part, part[-1])
        axes.fill_between(x, bottom, top, step="post", color=colour, linewidth=0)
        bottom = top


def _label_strips(axes: Axes, pages: Pages, pids: list[int], report: Report) -> None:
    commands = {mapping.pid: mapping.command for mapping in pages.mappings}
    axes.set_yticks(range(len(pids)), [f"{commands[pid]} {pid}" for pid in pids], fontsize=8)
    axes.set_ylim(len(pids) - 0.4, -0.6)
    axes.set_xlabel("memory that is there, by address, MiB")
    hidden = report.processes - len(pids)
    more = f", the {len(pids)} largest of {report.processes} processes" if hidden else ""
    axes.set_title(
        f"{format_size(report.total.pages * PAGE)} looked at, sharing would save "
        f"{format_size(report.total.saved)}{more}",
        loc="left",
        fontsize=10,
        pad=26,
    )
    axes.legend(
        handles=[Patch(color=colour, label=label) for colour, label in _COLOURS.values()],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(_COLOURS),
        fontsize=8,
        frameon=False,
        handlelength=1,
    )
    axes.spines[["top", "right"]].set_visible(False)


def _runs(axes: Axes, report: Report) -> None:
    lengths = list(report.runs)
    saved = [count * PAGE / (1 << 20) for count in report.runs.values()]
    axes.bar(range(len(lengths)), saved, color=_COLOURS[Kind.SAME_HOST][0], width=0.7)
    labels = ["1" if n == 1 else f"{n}-{2 * n - 1}" for n in lengths]
    axes.set_xticks(range(len(lengths)), labels, fontsize=8)
    axes.set_xlabel("length of the run of equal neighbours, pages")
    axes.set_ylabel("would save, MiB")
    if not lengths:
        axes.text(0.5, 0.5, "no duplicates", transform=axes.transAxes, ha="center")
    axes.spines[["top", "right"]].set_visible(False)
