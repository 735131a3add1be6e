"""In a pod: clones an arena of another node, at once and then lazily, and tells what came of it."""

import hashlib
import json
import sys

import samepage

source = sys.argv[1]
copies = {}
with samepage.connect() as node:
    for name, lazy in (("whole", False), ("lazy", True)):
        seen: list[samepage.CloneProgress] = []
        with node.clone_arena(source, name, lazy=lazy, progress=seen.append) as arena:
            digest = hashlib.sha256(arena.buffer).hexdigest()
        local, fetched = seen[-1].local_bytes, seen[-1].fetched_bytes
        copies[name] = {"digest": digest, "local": local, "fetched": fetched}
print(json.dumps(copies))
