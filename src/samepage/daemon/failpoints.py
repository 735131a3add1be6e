"""Named places where a test lets a daemon die, fail or stall.

A daemon that is started with SAMEPAGE_FAILPOINTS=DIR looks, whenever it comes by the failpoint
NAME, for the file DIR/NAME. The first process that removes the file does what it says: `kill` (this
process ends as by kill -9), `error` (FailpointError is raised), or `sleep SECONDS` (the whole
process stands still). Each file thus acts once, in one process, and can be laid while daemons run;
that it is gone tells that the place was reached. Without the variable nothing is looked for.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from samepage.errors import SamepageError

VARIABLE = "SAMEPAGE_FAILPOINTS"

_directory = os.environ.get(VARIABLE, "")

#: Every failpoint, and what has just happened, or is about to, when a daemon comes by.
FAILPOINTS: dict[str, str] = {
    "clone.asked": "an agent asked for a clone",
    "clone.snapshot": "the source has a snapshot, and that is noted here",
    "clone.opened": "the agent has made the arena",
    "clone.away": "all pages are away",
    "clone.mapped": "pages that were here are mapped",
    "clone.fetched": "pages have come, and are to be mapped",
    "clone.whole": "no page is away, and the agent is to be told",
    "clone.told": "the agent was told",
    "migrate.round": "a round has come",
    "migrate.frozen": "the last round has come, and the source is frozen",
    "migrate.noted": "it is noted that the source is asked to leave",
    "migrate.left": "the source has answered whether it left",
    "snapshot.begun": "a snapshot is noted, and its owner does not know it yet",
    "snapshot.looked": "pages of a snapshot have slots, and nobody holds these",
    "snapshot.held": "pages of a snapshot are held, and its owner does not know them yet",
    "snapshot.read": "pages of a snapshot were read, and are not offered yet",
    "snapshot.offered": "pages of a snapshot are offered, and its owner does not know them yet",
    "snapshot.frozen": "the agent has frozen the arena, and nothing was read since",
    "snapshot.leaving": "the agent is to be told to leave",
    "snapshot.left": "the agent has answered whether it left, and the owner does not know",
    "snapshot.ended": "a snapshot was ended, and its owner does not know",
    "pages.found": "pages are on their way to another host",
    "pages.held": "pages are held for another host, which does not know it yet",
    "pages.released": "pages are not held any more, and the other host does not know",
    "leases.granted": "another host holds pages for this one, and that is known here",
    "evict.read": "pages that are to be evicted were read",
    "evict.held": "other hosts were asked to hold pages that are to be evicted",
    "evict.safe": "pages that are to be evicted are safe elsewhere",
    "evict.gone": "the agent has let go of evicted pages",
    "return.supplied": "the bytes of away pages were found",
    "return.filled": "away pages have their bytes again",
    "spill.written": "pages were written to the spill file, and not synced",
    "spill.synced": "pages are in the spill file, and nobody knows",
}


class FailpointError(SamepageError):
    """A failpoint's `error`; only ever in tests."""


def failpoint(name: str) -> None:
    """Do what a test has laid for this place; as a rule, nothing.

    Raises:
        FailpointError: it said `error`.
    """
    assert name in FAILPOINTS, f"{name} is not in the list of failpoints"
    if _directory:
        _act(Path(_directory) / name)


def _act(file: Path) -> None:
    try:
        action, *seconds = file.read_text().split()
        file.unlink()
    except FileNotFoundError:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "error":
        raise FailpointError(f"failpoint {file.name}")
    elif action == "sleep":
        time.sleep(float(*seconds))
    else:
        raise AssertionError(f"failpoint {file.name}: {action!r} is no kill, error or sleep")
