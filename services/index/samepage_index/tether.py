"""Runs a program that ends when its parent does, however the parent ends.

    python tether.py PARENT_PID PROGRAM [ARGUMENT...]

A program of its own, since the kernel's request is kept over exec() but must be made by the child,
and a process with threads must not run Python between fork() and exec().
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become the program."""
    parent, program = int(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    # The parent may have ended before the request was made.
    if os.getppid() != parent:
        sys.exit("the parent is gone")
    os.execv(program[0], program)


if __name__ == "__main__":
    main()
