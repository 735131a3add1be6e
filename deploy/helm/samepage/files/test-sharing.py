"""Two processes fill arenas with the same bytes and share them: it must be most of the pages."""

import os
import subprocess
import sys

import samepage

SIZE = 16 << 20
SHARED_AT_LEAST = 0.9


def fill(name: str) -> None:
    with samepage.connect() as node, node.create_arena(name, size=SIZE) as arena:
        for page in range(0, SIZE, 4096):
            arena.buffer[page : page + 16] = b"samepage%8d" % page
        print(arena.share(timeout=60.0), flush=True)
        print(arena.stats().shared, flush=True)
        sys.stdin.readline()


def main() -> None:
    if len(sys.argv) > 1:
        return fill(sys.argv[1])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, __file__]
    tag = os.environ.get("HOSTNAME", "test")
    with (
        subprocess.Popen([*command, f"{tag}-1"], **pipes) as first,
        subprocess.Popen([*command, f"{tag}-2"], **pipes) as second,
    ):
        for process in (first, second):
            print(process.stdout.readline().strip())
            shared = int(process.stdout.readline())
            print(f"{shared} of {SIZE // 4096} pages are shared")
        for process in (first, second):
            process.stdin.close()
    if shared < SHARED_AT_LEAST * SIZE // 4096:
        sys.exit("too few: `kubectl exec` into the agent, `samepage doctor` says why")


main()
