"""In a pod: has an arena held by a helper, writes to it, and reads the same; says so as JSON."""

import json
import os
import pathlib
import sys

import grpc

from samepage.v1 import arenas_pb2 as pb
from samepage.v1 import arenas_pb2_grpc

CHUNK_BYTES = 1 << 20

address, domain = sys.argv[1:]
files = pathlib.Path("/certificate")
credentials = grpc.ssl_channel_credentials(
    *((files / name).read_bytes() for name in ("ca.crt", "tls.key", "tls.crt"))
)
options = (("grpc.ssl_target_name_override", "arenas.samepage"),)
data = os.urandom(4 * CHUNK_BYTES)
with grpc.secure_channel(address, credentials, options) as channel:
    arenas = arenas_pb2_grpc.ArenasStub(channel)
    request = pb.CreateArenaRequest(domain=domain, arena="held", size=len(data))
    created = arenas.CreateArena(request, wait_for_ready=True, timeout=60)
    written = [pb.WriteArenaRequest(target=pb.WriteTarget(domain=domain, arena="held"))]
    for offset in range(0, len(data), CHUNK_BYTES):
        chunk = pb.WriteChunk(offset=offset, data=data[offset : offset + CHUNK_BYTES])
        written.append(pb.WriteArenaRequest(chunk=chunk))
    arenas.WriteArena(iter(written), timeout=60)
    read = arenas.ReadArena(pb.ReadArenaRequest(domain=domain, arena="held"), timeout=60)
    same = b"".join(part.data for part in read) == data
print(json.dumps({"domain": created.arena.domain, "same": same}))
