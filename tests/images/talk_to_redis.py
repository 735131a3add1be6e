"""Runs in a container: starts the tryout Redis by the chart's script, and talks to it.

Prints whether the password lets in, what is said without it, and whether processes show it.
"""

import subprocess
import sys
from pathlib import Path

import valkey

SOCKET = "/tmp/redis.sock"
PASSWORD = "a-password"

Path("/tmp/redis-password").write_text(PASSWORD)
server = subprocess.Popen(["sh", "-c", sys.argv[1]], stdout=sys.stderr)
try:
    while True:
        try:
            print(valkey.Valkey(unix_socket_path=SOCKET, password=PASSWORD).ping())
            break
        except valkey.exceptions.ConnectionError:
            assert server.poll() is None, "it ended"
    try:
        valkey.Valkey(unix_socket_path=SOCKET).ping()
    except valkey.exceptions.AuthenticationError as error:
        print(error)
    print(PASSWORD in Path(f"/proc/{server.pid}/cmdline").read_text())
finally:
    server.terminate()
    server.wait()
