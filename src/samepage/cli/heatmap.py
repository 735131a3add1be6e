"""How much hosts have in common, as a picture: a row a host, a column for each other one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

from samepage.cli.daemons import Overlap
from samepage.reports import PAGE_SIZE
from samepage.sizes import format_size

_LABELLED_MAX = 24


def draw(rows: Sequence[tuple[str, Overlap]], others: Sequence[str], out: Path) -> None:
    """Write the picture, .png or .svg by its name."""
    shares = np.full((len(rows), len(others)), np.nan)
    for row, (name, found) in enumerate(rows):
        for column, other in enumerate(others):
            if other != name and found.distinct_pages:
                shares[row, column] = found.hosts.get(other, 0) / found.distinct_pages
    size = (3.2 + 0.75 * len(others), 1.9 + 0.55 * len(rows))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    axes.set_facecolor("#DDDDDD")
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(image, label="share that the other host has", format="{x:.0%}")
    axes.set_xticks(range(len(others)), others, rotation=30, ha="right")
    sizes = [format_size(found.distinct_pages * PAGE_SIZE) for _, found in rows]
    labels = [f"{name}\n{size}" for (name, _), size in zip(rows, sizes, strict=True)]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_xlabel("other host")
    axes.set_ylabel("distinct memory of")
    if len(others) <= _LABELLED_MAX:
        for (row, column), share in np.ndenumerate(shares):
            if not np.isnan(share):
                colour = "white" if share < 0.6 else "black"
                axes.text(column, row, f"{share:.0%}", ha="center", va="center", color=colour)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
