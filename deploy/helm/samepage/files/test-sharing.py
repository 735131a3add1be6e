"""Two processes fill arenas with the same bytes and share them: it must be most of the pages."""

import os
import subprocess
import sys

import samepage

SIZE = 16 << 20
PAGES = SIZE // 4096
SHARED_AT_LEAST = 0.9


def fill(name: str) -> None:
    """In each process: do what the lines of standard input say."""
    with samepage.connect() as node, node.create_arena(name, size=SIZE) as arena:
        for page in range(PAGES):
            start = page * 4096
            arena.buffer[start : start + 16] = b"samepage%8d" % page
        print("filled", flush=True)
        for _ in sys.stdin:
            print(arena.share(timeout=60.0).shared, flush=True)


def ask(process: subprocess.Popen) -> int:
    """Let a process share; returns how many of its pages are shared then."""
    process.stdin.write("share\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def main() -> None:
    if len(sys.argv) > 1:
        return fill(sys.argv[1])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, __file__]
    name = os.environ.get("HOSTNAME", "test")
    with (
        subprocess.Popen([*command, f"{name}-1"], **pipes) as first,
        subprocess.Popen([*command, f"{name}-2"], **pipes) as second,
    ):
        for process in (first, second):
            if process.stdout.readline() != "filled\n":
                sys.exit("a process cannot use samepage: the lines above say why")
        ask(first)
        shared = [ask(second), ask(first)]
    print(f"of {PAGES} pages each, {shared} are shared")
    if min(shared) < SHARED_AT_LEAST * PAGES:
        sys.exit("too few: `kubectl exec` into the merger, `samepage doctor` says why")


main()
