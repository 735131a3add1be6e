"""In a pod that has nothing but the webhook's label: says which domain it is in."""

import json

import samepage

with samepage.connect() as node, node.create_arena("labelled", 4096) as arena:
    print(json.dumps(arena.domain))
