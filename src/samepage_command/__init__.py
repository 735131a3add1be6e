"""The `samepage` command from its first instant: Ctrl-C ends it, also while the rest is imported.

A package by itself, since whatever is in `samepage` imports all of it first.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

INTERRUPTED = 130


def main() -> None:
    """Import the command and run it."""
    handler = signal.getsignal(signal.SIGINT)
    # not where it is ignored, as in the background of a script
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)
    from samepage.cli import main as command

    signal.signal(signal.SIGINT, handler)
    command()


def _exit(signum: int, frame: FrameType | None) -> None:
    """End at once: an exception could come out of any import as another one."""
    os._exit(INTERRUPTED)
