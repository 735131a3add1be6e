"""What the demo found, for people and for programs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from samepage.cli.demo.files import Input
from samepage.cli.demo.measure import Memory
from samepage.cli.output import console, print_table
from samepage.sizes import format_size


@dataclass(frozen=True)
class HostReport:
    """A host's memory before and after sharing."""

    name: str
    workers: int
    before: Memory
    after: Memory


@dataclass(frozen=True)
class Sharing:
    """What sharing took: seconds by the clock, and CPU seconds by part.

    `shared_pages` of all workers were mapped to the store in the end.
    """

    wall_seconds: float
    cpu_seconds: dict[str, float]
    shared_pages: int


@dataclass(frozen=True)
class OverlapReport:
    """How many of `distinct_pages` of `host` the index knows on `other`."""

    host: str
    other: str
    pages: int
    distinct_pages: int


@dataclass(frozen=True)
class WriteReport:
    """One worker wrote into `pages` pages.

    `made_private` left the store for that: those, and some ahead of writes in sequence.
    """

    worker: str
    pages: int
    made_private: int
    changed: tuple[str, ...]


@dataclass(frozen=True)
class Checked:
    """Whether a worker's memory holds what it must."""

    worker: str
    files_equal: bool
    own_intact: bool

    @property
    def ok(self) -> bool:
        """Both."""
        return self.files_equal and self.own_intact


@dataclass(frozen=True)
class Report:
    """All of it."""

    inputs: list[Input]
    hosts: list[HostReport]
    sharing: Sharing
    overlap: OverlapReport
    write: WriteReport
    checks: list[Checked]

    @property
    def ok(self) -> bool:
        """Whether every byte is what it must be, and the writer alone changed."""
        return all(check.ok for check in self.checks) and self.write.changed == (self.write.worker,)

    def to_json(self) -> dict[str, Any]:
        """Return it for programs. Bytes, pages and seconds."""
        result = dataclasses.asdict(self)
        for host, values in zip(self.hosts, result["hosts"], strict=True):
            values["before"]["total"] = host.before.total
            values["after"]["total"] = host.after.total
        return {"ok": self.ok, **result}


def show(report: Report) -> None:
    """Print the tables."""
    _show_memory(report)
    _show_sharing(report.sharing)
    overlap = report.overlap
    share = overlap.pages / overlap.distinct_pages if overlap.distinct_pages else 0.0
    console.print(
        f"Of {overlap.distinct_pages:,} different pages of {overlap.host}, the index knows "
        f"{overlap.pages:,} on {overlap.other} too ({share:.1%}).",
        highlight=False,
    )
    _show_write(report.write)
    _show_checks(report)


def _show_memory(report: Report) -> None:
    rows = []
    for host in report.hosts:
        for moment, memory in (("before", host.before), ("after", host.after)):
            own = memory.pss - memory.pss_store
            cells = [format_size(size) for size in (own, memory.store, memory.total)]
            saved = 1 - memory.total / host.before.total
            rows.append((host.name, moment, *cells, f"{saved:.1%}" if moment == "after" else ""))
    print_table(
        ["host", "", ">workers (Pss)", ">store (resident)", ">together", ">saved"],
        rows,
        "Memory by host, from the kernel (Pss without mapped store pages)",
    )


def _show_sharing(sharing: Sharing) -> None:
    cpu = sharing.cpu_seconds
    parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in cpu.items())
    console.print(
        f"Sharing {sharing.shared_pages:,} pages took {sharing.wall_seconds:.2f} s, and "
        f"{sum(cpu.values()):.2f} s of CPU time ({parts}).",
        highlight=False,
    )


def _show_write(write: WriteReport) -> None:
    changed = ", ".join(write.changed) or "none"
    console.print(
        f"{write.worker} wrote into {write.pages} shared pages, and {write.made_private} became "
        f"its own; memory that changed: {changed}.",
        highlight=False,
    )


def _show_checks(report: Report) -> None:
    files = len(report.inputs)
    for check in report.checks:
        if not check.ok:
            what = "its own pages" if check.files_equal else "the files"
            console.print(f"[bold red]{check.worker}: {what} differ[/]", highlight=False)
    if report.ok:
        console.print(
            f"[green]All {len(report.checks)} workers hold exactly the bytes of the {files} files "
            "(SHA-256), and what they wrote themselves.[/]",
            highlight=False,
        )
