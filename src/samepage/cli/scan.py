"""`samepage scan`: what sharing would save, before anything is changed."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from samepage.cli import daemons, places
from samepage.cli.output import DirectoryOption, JsonOption, messages, print_json, print_table
from samepage.errors import InvalidArgumentError, NotFoundError, SamepageError
from samepage.reports import PAGE_SIZE
from samepage.sizes import format_size, parse_size

if TYPE_CHECKING:
    from samepage.scan.compare import Report
    from samepage.scan.memory import Mapping

_ROWS = 12
_STRETCHES = 1200
_PLOTS = (".png", ".svg")


def scan(
    pid: Annotated[
        list[int] | None, typer.Option(help="Scan this process's memory. Repeatable.")
    ] = None,
    cgroup: Annotated[
        Path | None, typer.Option(help="Scan the processes of this control group's directory.")
    ] = None,
    match: Annotated[
        str | None, typer.Option(help="Scan processes whose command line this pattern finds.")
    ] = None,
    files: Annotated[
        bool, typer.Option("--files", help="Also what processes changed of mapped files.")
    ] = False,
    limit: Annotated[
        str | None, typer.Option(help='Read no more than this, such as "8GiB".')
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw where the duplicates are: a .png or .svg file.")
    ] = None,
    directory: DirectoryOption = None,
    json: JsonOption = False,
) -> None:
    """Tell what sharing would save; reads memory, and changes nothing.

    Without a process it tells of the host's arenas, by the scanner's books. Of processes it counts
    anonymous memory, whether or not they use samepage; that takes the right to trace them.
    """
    if plot is not None and plot.suffix not in _PLOTS:
        raise InvalidArgumentError(f"--plot {plot}: give a name that ends with .png or .svg")
    if plot is not None:
        _need("matplotlib", "plot", "to draw")
    if not (pid or cgroup or match):
        if files or limit:
            raise InvalidArgumentError("--files and --limit are for processes: name some")
        _scan_arenas(places.find(directory).hosts, plot, json)
        return
    _need("numpy", "services", "to compare memory")
    pids = _processes(pid or [], cgroup, match)
    _scan_processes(pids, files, None if limit is None else parse_size(limit), plot, json)


def _need(module: str, extra: str, what: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise SamepageError(f"{what} takes {module}: pip install 'samepage[{extra}]'")


def _processes(pids: Sequence[int], cgroup: Path | None, match: str | None) -> list[int]:
    from samepage.scan import memory

    chosen = list(pids)
    if cgroup is not None:
        chosen += memory.processes_of_cgroup(cgroup)
    if match is not None:
        try:
            pattern = re.compile(match)
        except re.error as error:
            raise InvalidArgumentError(f"--match {match!r} is no pattern: {error}") from error
        chosen += memory.processes_matching(pattern)
    if not chosen:
        raise NotFoundError("there is no process to scan: nothing matches")
    return sorted(set(chosen))


def _scan_processes(
    pids: Sequence[int], files: bool, limit: int | None, plot: Path | None, json: bool
) -> None:
    from samepage.scan import compare, memory

    wanted = _mappings(pids, files)
    with _progress(wanted) as advance:
        pages = memory.read(wanted, None if limit is None else limit // PAGE_SIZE, advance)
    found = compare.compare(pages)
    report = compare.report(pages, found)
    if plot is not None:
        from samepage.scan import picture

        picture.draw(pages, found, report, plot)
        messages.print(f"drawn: {plot}", highlight=False, soft_wrap=True)
    if json:
        print_json(report.to_json())
    else:
        _show(report)


def _mappings(pids: Sequence[int], files: bool) -> list[Mapping]:
    """The mappings of all processes; of several, one that ended meanwhile is left out."""
    from samepage.scan import memory

    wanted = []
    for pid in pids:
        try:
            wanted += memory.mappings(pid, files)
        except NotFoundError:
            if len(pids) == 1:
                raise
            messages.print(f"process {pid} has ended: left out", highlight=False)
    return wanted


@contextmanager
def _progress(wanted: Sequence[Mapping]) -> Iterator[Any]:
    columns = (TextColumn("reading"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=messages, transient=True) as progress:
        task = progress.add_task("reading", total=sum(mapping.pages for mapping in wanted))
        yield lambda pages: progress.advance(task, pages)


def _show(report: Report) -> None:
    total = report.total
    rows = [
        ("all that was looked at", total.pages),
        ("only zeros", total.zero),
        ("equal to others of the same process", total.same_process),
        ("equal to other processes'", total.same_host),
        ("unique", total.unique),
        ("one page of memory already", total.one_already),
    ]
    print_table(
        ["pages", ">", ">memory", ">"],
        [(name, pages, _size(pages), _share(pages, total.pages)) for name, pages in rows],
        f"{report.processes} processes",
    )
    print_table(
        [">would save", ">pid", "command", "mapping", ">of"],
        [
            (
                format_size(m.counts.saved),
                str(m.pid),
                m.command,
                escape(m.name),
                _size(m.counts.pages),
            )
            for m in report.mappings[:_ROWS]
            if m.counts.saved
        ],
    )
    _show_runs(report.runs)
    print(
        f"Sharing would save {format_size(total.saved)}: {_size(total.zero)} of zeros, "
        f"{format_size(report.in_runs_of(64))} in runs of at least 64 pages, "
        f"{format_size(report.in_runs_of(8))} of at least 8."
    )
    if report.swapped or report.changed:
        print(f"Not looked at: {report.swapped} pages in swap, {report.changed} that went.")
    if total.pages and not report.frames_known:
        print("Pages that are shared already, by fork or KSM, are counted: only root can tell.")


def _show_runs(runs: dict[int, int]) -> None:
    if runs:
        most = sum(runs.values())
        print_table(
            [">run, pages", ">pages", ">"],
            [(_class(length), pages, _share(pages, most)) for length, pages in runs.items()],
            "what would be saved by length of run, zeros left out",
        )


def _size(pages: int) -> str:
    return format_size(pages * PAGE_SIZE)


def _class(length: int) -> str:
    return "1" if length == 1 else f"{length:,}-{2 * length - 1:,}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _scan_arenas(hosts: Sequence[places.Host], plot: Path | None, json: bool) -> None:
    stretches = 0 if plot is None else _STRETCHES
    found = [(host, daemons.estimate_savings(host, stretches)) for host in hosts]
    if plot is not None:
        from samepage.scan import picture

        named = {host.name or str(host.directory): domains for host, domains in found}
        picture.draw_arenas(named, _runs(found), plot)
        messages.print(f"drawn: {plot}", highlight=False, soft_wrap=True)
    if json:
        print_json(
            [
                {"host": host.name, "domains": [d.to_json() for d in domains]}
                for host, domains in found
            ]
        )
        return
    rows = [
        (
            host.name or str(host.directory),
            domain.domain,
            arena.name,
            _size(arena.pages),
            _size(arena.shared),
            _size(arena.zero),
            _size(arena.duplicate),
            _size(arena.same_process),
            _size(arena.same_host),
            arena.runs,
            _size(arena.kept),
            _size(arena.absent),
        )
        for host, domains in found
        for domain in domains
        for arena in domain.arenas
    ]
    columns = ("host", "domain", "arena", ">size", ">shared", ">zero", ">duplicate")
    kinds = (">same process", ">same host", ">runs", ">kept", ">absent")
    print_table([*columns, *kinds], rows)
    _show_runs(_runs(found))
    saved = sum(a.zero + a.duplicate for _, domains in found for d in domains for a in d.arenas)
    print(f"Sharing now would save {_size(saved)}. 'samepage share' does it.")


def _runs(found: Sequence[tuple[places.Host, list[daemons.DomainEstimate]]]) -> dict[int, int]:
    """Pages that would be saved, by length of run, of all hosts."""
    runs: Counter[int] = Counter()
    for _, domains in found:
        for domain in domains:
            runs.update(domain.runs)
    return dict(sorted(runs.items()))
