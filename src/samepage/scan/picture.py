"""Where duplicates are, as a picture: a strip a process or an arena, and the lengths of runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from samepage.cli.daemons import ArenaEstimate, DomainEstimate
from samepage.scan.compare import Comparison, Kind, Report
from samepage.scan.memory import PAGE, Pages
from samepage.sizes import format_size

Edges = npt.NDArray[np.int64]
# A colour, and by column the share of pages that are of it.
Part = tuple[str, npt.NDArray[np.float64]]

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


# Of arenas: what a page is, and how it is called.
_OF_ARENAS = {
    "kept": ("#BBBBBB", "no equal page, or the one that is kept"),
    "duplicate": ("#0072B2", "would be shared"),
    "shared": ("#CC79A7", "is shared"),
    "zero": ("#009E73", "only zeros"),
    "absent": ("#F2F2F2", "never touched"),
}


def draw(pages: Pages, found: Comparison, report: Report, out: Path) -> None:
    """Draw processes. The picture is a .png or .svg by its name; of many, the largest are shown."""
    pids = np.array([mapping.pid for mapping in pages.mappings] or [0])[pages.mapping]
    owners, counts = np.unique(pids, return_counts=True)
    shown = owners[np.argsort(-counts, kind="stable")][:_STRIPS_MAX]
    widest = int(counts.max()) if counts.size else 1
    commands = {mapping.pid: mapping.command for mapping in pages.mappings}
    hidden = report.processes - len(shown)
    more = f", the {len(shown)} largest of {report.processes} processes" if hidden else ""
    title = (
        f"{format_size(report.total.pages * PAGE)} looked at, sharing would save "
        f"{format_size(report.total.saved)}{more}"
    )
    with _figure(len(shown), out) as (upper, lower):
        for row, pid in enumerate(shown.tolist()):
            _stack(upper, row, *_parts(found.kinds[pids == pid], widest))
        names = [f"{commands[pid]} {pid}" for pid in shown.tolist()]
        _label(upper, names, title, "memory that is there, by address, MiB", _COLOURS.values())
        _runs(lower, report.runs)


def draw_arenas(
    hosts: Mapping[str, Sequence[DomainEstimate]], runs: Mapping[int, int], out: Path
) -> None:
    """Draw the arenas of hosts, by what a share would make of their pages."""
    arenas = [
        (f"{host} {domain.domain}/{arena.name}", arena)
        for host, domains in hosts.items()
        for domain in domains
        for arena in domain.arenas
    ]
    saved = sum(arena.zero + arena.duplicate for _, arena in arenas) * PAGE
    size = sum(arena.pages for _, arena in arenas) * PAGE
    shown = sorted(arenas, key=lambda named: -named[1].pages)[:_STRIPS_MAX]
    more = f", the {len(shown)} largest of {len(arenas)}" if len(shown) < len(arenas) else ""
    title = f"arenas of {format_size(size)}{more}; sharing would save {format_size(saved)}"
    with _figure(len(shown), out) as (upper, lower):
        for row, (_, arena) in enumerate(shown):
            _stack(upper, row, *_parts_of(arena))
        names = [name for name, _ in shown]
        _label(upper, names, title, "the arena, MiB", _OF_ARENAS.values())
        _runs(lower, runs)


@contextmanager
def _figure(strips: int, out: Path) -> Iterator[tuple[Axes, Axes]]:
    """Axes for strips and for run lengths, written to the file at the end."""
    height = 2.9 + 0.36 * max(strips, 1)
    figure, (upper, lower) = pyplot.subplots(
        2,
        1,
        figsize=(11, height + 2.2),
        height_ratios=(max(height - 1.6, 1), 2.6),
        layout="constrained",
    )
    yield upper, lower
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def _parts(kinds: npt.NDArray[np.uint8], widest: int) -> tuple[Edges, list[Part]]:
    """A process: its pages by address, as wide as it is large, and the share of each kind."""
    columns = max(1, round(_COLUMNS * len(kinds) / widest))
    edges = np.unique(np.linspace(0, len(kinds), columns + 1).astype(np.int64))
    starts, widths = edges[:-1], np.diff(edges)
    return edges, [
        (colour, np.add.reduceat((kinds == kind).astype(np.float64), starts) / widths)
        for kind, (colour, _) in _COLOURS.items()
    ]


def _parts_of(arena: ArenaEstimate) -> tuple[Edges, list[Part]]:
    """An arena, by the scanner's stretches."""
    names = ("pages", "absent", "shared", "zero", "duplicate")
    found = {
        name: np.array([getattr(stretch, name) for stretch in arena.stretches]) for name in names
    }
    pages = found.pop("pages")
    found["kept"] = pages - sum(found.values())
    edges = np.concatenate(([0], np.cumsum(pages)))
    return edges, [(colour, found[name] / pages) for name, (colour, _) in _OF_ARENAS.items()]


def _stack(axes: Axes, row: int, edges: Edges, parts: Sequence[Part]) -> None:
    """A strip; where pages are mixed, its colours show their shares."""
    x = edges * PAGE / (1 << 20)
    bottom = np.full(len(edges), row - 0.4)
    for colour, part in parts:
        top = bottom + 0.8 * np.append(part, part[-1])
        axes.fill_between(x, bottom, top, step="post", color=colour, linewidth=0)
        bottom = top


def _label(
    axes: Axes, names: Sequence[str], title: str, what: str, colours: Iterable[tuple[str, str]]
) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(what)
    axes.set_title(title, loc="left", fontsize=10, pad=26)
    handles = [Patch(color=colour, label=label) for colour, label in colours]
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(handles),
        fontsize=8,
        frameon=False,
        handlelength=1,
    )
    axes.spines[["top", "right"]].set_visible(False)


def _runs(axes: Axes, runs: Mapping[int, int]) -> None:
    lengths = list(runs)
    saved = [count * PAGE / (1 << 20) for count in runs.values()]
    axes.bar(range(len(lengths)), saved, color=_COLOURS[Kind.SAME_HOST][0], width=0.7)
    labels = ["1" if n == 1 else f"{n}-{2 * n - 1}" for n in lengths]
    axes.set_xticks(range(len(lengths)), labels, fontsize=8)
    axes.set_xlabel("length of the run of equal neighbours, pages")
    axes.set_ylabel("would save, MiB")
    if not lengths:
        axes.text(0.5, 0.5, "no duplicates", transform=axes.transAxes, ha="center")
    axes.spines[["top", "right"]].set_visible(False)
