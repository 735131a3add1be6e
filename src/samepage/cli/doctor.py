"""`samepage doctor`: what this machine offers, what is missing, and what still works then."""

from __future__ import annotations

import dataclasses
import os
import platform
import typing
from dataclasses import dataclass
from pathlib import Path

import typer

from samepage import native
from samepage.cli import daemons, places
from samepage.cli.output import DirectoryOption, JsonOption, print_json, print_table
from samepage.errors import NotRunningError, SamepageError
from samepage.sizes import format_size

State = typing.Literal["ok", "missing", "warning", "note"]

LACKS_FEATURE = 4
_MAP_COUNT_WANTED = 262_144
_KSM = Path("/sys/kernel/mm/ksm")
_STORE = Path("/dev/shm")
_DEVICE = Path("/dev/userfaultfd")
_BLIND = "cannot tell: this user may not open /dev/userfaultfd, and no merger runs that lends it"

# For each feature: since which kernel, whether sharing needs it, and what its lack means.
_FEATURES = {
    native.Feature.USERFAULTFD: (
        "6.1",
        True,
        "only sealed arenas are shared, others are plain memory; scanning and reports still work. "
        "Start the merger with access to /dev/userfaultfd: it lends it to applications",
    ),
    native.Feature.MOVE: (
        "6.8",
        True,
        "only sealed arenas are shared; fingerprints, scanning and reports still work",
    ),
    native.Feature.WP_TMPFS: (
        "5.19",
        True,
        "writes to shared pages cannot be followed, so only sealed arenas are shared; scanning "
        "still works",
    ),
    native.Feature.REMAP: (
        "4.11",
        True,
        "shared pages cannot be put in place in one step, so only sealed arenas are shared; "
        "scanning still works",
    ),
    native.Feature.POISON: (
        "6.6",
        False,
        "arenas cannot be cloned, migrated or evicted, since lost bytes could not be told of; "
        "sharing on one host does not need it",
    ),
    native.Feature.PAGEMAP_SCAN: (
        "6.7",
        False,
        "each pass fingerprints all pages, not just those written since the last one: all works, "
        "with more CPU time",
    ),
    native.Feature.TRACKING: (
        "6.7",
        False,
        "writes are not followed: each pass fingerprints all pages, not just those written since "
        "the last one; all works, with more CPU time",
    ),
    native.Feature.DISCARD: (
        "5.14",
        False,
        "shared pages that an application discards with madvise() show their old bytes, not "
        "zeros; Arena.discard() works",
    ),
    native.Feature.AWAY: (
        "6.8",
        False,
        "pages cannot be on other hosts: arenas are neither cloned nor migrated here, nor evicted; "
        "sharing on one host does not need it",
    ),
}


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table."""

    name: str
    state: State
    detail: str


def doctor(directory: DirectoryOption = None, json: JsonOption = False) -> None:
    """Check the kernel's features, the system's settings and the daemons.

    Exits with 4 when the kernel, or this user's rights, lack what sharing needs.
    """
    cluster = _cluster(directory)
    checks = [
        Check("kernel", "note", f"{platform.system()} {platform.release()} {platform.machine()}"),
        *_features(cluster),
        _device(),
        _map_count(),
        _tmpfs(),
        _ksm(),
        *_daemons(cluster),
    ]
    able = not any(check.state == "missing" for check in checks)
    if json:
        print_json({"ok": able, "checks": [dataclasses.asdict(check) for check in checks]})
    else:
        _show(checks)
    if not able:
        raise typer.Exit(LACKS_FEATURE)


def _cluster(directory: Path | None) -> places.Cluster:
    """The hosts to look at; none when nothing was asked for and nothing runs."""
    try:
        return places.find(directory)
    except NotRunningError:
        if directory is not None:
            raise
        return places.Cluster(())


def _show(checks: list[Check]) -> None:
    colours = {"ok": "green", "missing": "red", "warning": "yellow", "note": "dim"}
    print_table(
        ["check", "state", "what it means"],
        [
            (check.name, f"[{colours[check.state]}]{check.state}[/]", check.detail)
            for check in checks
        ],
    )


def _features(cluster: places.Cluster) -> list[Check]:
    """What this process can use, with what the first host's merger lends it."""
    found = native.probe(str(cluster.hosts[0].directory) if cluster.hosts else None)
    blind = native.Feature.USERFAULTFD not in found and not cluster.hosts and not _may_open()
    checks = []
    for feature, (since, needed, lack) in _FEATURES.items():
        name = f"{(feature.name or '').lower()} (Linux {since})"
        if feature in found:
            checks.append(Check(name, "ok", "there"))
        elif blind:
            checks.append(Check(name, "warning", _BLIND))
        else:
            checks.append(Check(name, "missing" if needed else "warning", f"without it {lack}"))
    return checks


def _may_open() -> bool:
    return not _DEVICE.exists() or os.access(_DEVICE, os.R_OK | os.W_OK)


def _device() -> Check:
    path = _DEVICE
    if not path.exists():
        detail = "not there (Linux 6.1): only a process with CAP_SYS_PTRACE gets a userfaultfd"
        return Check(str(path), "warning", detail)
    if _may_open():
        return Check(str(path), "ok", "this user may open it, so a merger that it runs can lend it")
    return Check(
        str(path),
        "note",
        "not for this user; an application needs no access, the merger's user does",
    )


def _map_count() -> Check:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    name = "vm.max_map_count"
    if limit >= _MAP_COUNT_WANTED:
        return Check(name, "ok", f"{limit:,} mappings a process")
    return Check(
        name,
        "warning",
        f"{limit:,} mappings a process: each shared run takes one or two, so memory that is equal "
        f"in single pages is shared in part only; sysctl vm.max_map_count={_MAP_COUNT_WANTED}",
    )


def _tmpfs() -> Check:
    kinds = [line.split()[2] for line in _mounts() if line.split()[1] == str(_STORE)]
    if not kinds or kinds[-1] != "tmpfs":
        return Check(str(_STORE), "warning", "no tmpfs: give the merger another one to store in")
    status = os.statvfs(_STORE)
    free = status.f_bavail * status.f_frsize
    detail = f"tmpfs, {format_size(free)} free for shared pages"
    return Check(str(_STORE), "ok", detail)


def _mounts() -> list[str]:
    return Path("/proc/self/mounts").read_text().splitlines()


def _ksm() -> Check:
    try:
        running = (_KSM / "run").read_text().strip() == "1"
    except OSError:
        return Check("KSM", "note", "this kernel has none; samepage does not need it")
    if not running:
        return Check("KSM", "note", "off; samepage does not need it")
    return Check("KSM", "note", "on; it looks at memory that applications marked for it only")


def _daemons(cluster: places.Cluster) -> list[Check]:
    checks = []
    for host in cluster.hosts:
        status = daemons.host_status(host)
        place = host.name or str(host.directory)
        if status.errors:
            checks.append(Check(f"daemons of {place}", "warning", "; ".join(status.errors)))
        else:
            checks.append(Check(f"daemons of {place}", "ok", "merger and scanner answer"))
    if cluster.index:
        checks.append(_index(cluster.index))
    if not checks:
        detail = "none run in the default directory; start some with 'samepage up'"
        checks.append(Check("daemons", "note", detail))
    return checks


def _index(address: str) -> Check:
    try:
        return Check("index", "ok", f"answers, on {daemons.index_stats(address).store}")
    except SamepageError as error:
        return Check("index", "warning", str(error))
