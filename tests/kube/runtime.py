"""Runs runc without what only a root with CAP_SYS_RESOURCE may: podman asks for higher limits."""

import json
import os
import sys

arguments = sys.argv[1:]


def lower(file: str, *path: str) -> None:
    """Take the limits out of a process's description in a file."""
    with open(file) as read:
        content = json.load(read)
    process = content
    for name in path:
        process = process[name]
    for setting in ("rlimits", "oomScoreAdj"):
        process.pop(setting, None)
    with open(file, "w") as written:
        json.dump(content, written)


if "--bundle" in arguments:
    lower(f"{arguments[arguments.index('--bundle') + 1]}/config.json", "process")
if "--process" in arguments:
    lower(arguments[arguments.index("--process") + 1])
os.execvp("runc", ["runc", *arguments])
