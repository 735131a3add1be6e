"""Arenas for other languages: a Go client generated from proto/ as it stands, and grpcurl."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from application import PAGE, Application, content
from helpers.arenas_process import ArenasProcess, arenas_process
from helpers.up import Up, running

pytestmark = [
    pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap", "go"),
    # the first run builds grpcurl, unless `make test` has
    pytest.mark.timeout(600),
]

ROOT = Path(__file__).parents[2]
MIB = 2**20
# grpcurl ends with 64 and the status code.
NOT_FOUND, ALREADY_EXISTS, OUT_OF_RANGE = 64 + 5, 64 + 6, 64 + 11


@pytest.fixture(scope="module")
def programs() -> Path:
    """Where the Go client and grpcurl are, built from what proto/ says now."""
    subprocess.run(["make", "-C", ROOT, "go-client", f"VENV={sys.prefix}"], check=True)
    return Path(sys.prefix) / "go" / "bin"


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with running(tmp_path_factory.mktemp("cluster")) as up:
        yield up


@pytest.fixture
def helper(up: Up, tmp_path: Path) -> Iterator[ArenasProcess]:
    """A helper that tells what it offers."""
    with arenas_process(up.host(), tmp_path, reflection=True) as helper:
        helper.address()
        yield helper


def run_client(
    programs: Path, address: str, arena: str, data: bytes
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [programs / "client", address, arena], input=data, capture_output=True, timeout=60
    )


def grpcurl(
    programs: Path, address: str, *arguments: str, messages: list[dict[str, Any]] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it with messages, in JSON, as its input."""
    given = ["-d", "@"] if messages is not None else []
    return subprocess.run(
        [programs / "grpcurl", "-plaintext", *given, address, *arguments],
        input="\n".join(map(json.dumps, messages or [])),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_go_and_an_application_share(programs: Path, up: Up, helper: ArenasProcess) -> None:
    """64 MiB through the Go client come back equal, and are one with those of a process."""
    data = content(1, 64 * MIB // PAGE)
    with Application(up.host()) as application:
        application.call("create", "python", len(data) // PAGE)
        application.call("fill", "python", 1)
        done = run_client(programs, helper.address(), "go", data)
        assert done.returncode == 0, done.stderr
        assert done.stdout == data
        assert (
            f"{len(data)} bytes written, {len(data) // PAGE} pages shared" in done.stderr.decode()
        )
        assert application.call("stats", "python")["shared"] == len(data) // PAGE


def test_go_over_the_unix_socket(programs: Path, helper: ArenasProcess) -> None:
    data = os.urandom(3 * MIB + 5)
    done = run_client(programs, f"unix:{helper.api_socket}", "go", data)
    assert done.returncode == 0, done.stderr
    assert done.stdout == data.ljust(len(data) + PAGE - 5, b"\0")


def test_go_is_told_what_is_wrong(programs: Path, helper: ArenasProcess) -> None:
    assert run_client(programs, helper.address(), "go", b"first").returncode == 0
    for arena, status in (("go", "AlreadyExists"), ("a/b", "InvalidArgument")):
        done = run_client(programs, helper.address(), arena, b"second")
        assert (done.returncode, done.stdout) == (1, b"")
        assert f"code = {status}" in done.stderr.decode()
    gone = run_client(programs, "unix:/nonexistent", "go", b"third")
    assert gone.returncode == 1 and "code = Unavailable" in gone.stderr.decode()


def test_grpcurl_lists_and_describes(programs: Path, helper: ArenasProcess) -> None:
    listed = grpcurl(programs, helper.address(), "list")
    assert listed.returncode == 0, listed.stderr
    assert "samepage.v1.Arenas" in listed.stdout.split()
    methods = grpcurl(programs, helper.address(), "list", "samepage.v1.Arenas").stdout.split()
    assert "samepage.v1.Arenas.CreateArena" in methods
    described = grpcurl(programs, helper.address(), "describe", "samepage.v1.Arenas")
    assert "rpc WriteArena ( stream .samepage.v1.WriteArenaRequest )" in described.stdout
    message = grpcurl(programs, helper.address(), "describe", "samepage.v1.ShareOutcome")
    assert "uint64 merged = 1;" in message.stdout


def test_grpcurl_calls(programs: Path, helper: ArenasProcess) -> None:
    def call(method: str, *messages: dict[str, Any], code: int = 0) -> list[dict[str, Any]]:
        done = grpcurl(
            programs, helper.address(), f"samepage.v1.Arenas/{method}", messages=list(messages)
        )
        assert done.returncode == code, done.stderr
        return json_documents(done.stdout)

    data = os.urandom(2 * PAGE)
    made = {"domain": "default", "arena": "a", "size": str(2 * PAGE)}
    assert call("CreateArena", {"arena": "a", "size": 2 * PAGE}) == [{"arena": made}]
    call("CreateArena", {"arena": "a", "size": 1}, code=ALREADY_EXISTS)
    chunks = [
        {"chunk": {"offset": at, "data": base64.b64encode(data[at : at + PAGE]).decode()}}
        for at in (0, PAGE)
    ]
    (written,) = call("WriteArena", {"target": {"arena": "a"}}, *chunks)
    assert written == {"written_bytes": str(2 * PAGE)}
    (read,) = call("ReadArena", {"arena": "a", "offset": 1, "length": PAGE})
    assert read["offset"] == "1" and base64.b64decode(read["data"]) == data[1 : PAGE + 1]
    call("ReadArena", {"arena": "a", "offset": 2 * PAGE + 1}, code=OUT_OF_RANGE)
    (shared,) = call("ShareArena", {"arena": "a", "timeout_seconds": 20})
    assert shared["outcome"]["pages"] == "2"
    (stat,) = call("StatArena", {"arena": "a"})
    assert (stat["arena"], stat["pages"]) == (made, "2")
    assert call("ListHeldArenas", {}) == [{"arenas": [made]}]
    call("DeleteArena", {"arena": "a"})
    call("DeleteArena", {"arena": "a"}, code=NOT_FOUND)
    assert call("ListHeldArenas", {}) == [{}]


def json_documents(text: str) -> list[dict[str, Any]]:
    """Split documents that follow on each other."""
    decoder, at, found = json.JSONDecoder(), 0, []
    while text[at:].strip():
        at += len(text[at:]) - len(text[at:].lstrip())
        document, at = decoder.raw_decode(text, at)
        found.append(document)
    return found


def test_reflection_is_off_unless_asked_for(programs: Path, up: Up) -> None:
    address = up.cluster.hosts[0].arenas
    done = grpcurl(programs, address, "list")
    assert done.returncode != 0 and "reflection" in done.stderr
    proto = ["-import-path", str(ROOT / "proto"), "-proto", "samepage/v1/arenas.proto"]
    status = grpcurl(programs, *proto, address, "samepage.v1.Arenas/GetArenasStatus")
    assert json.loads(status.stdout)["node"] == "host-1"


def test_the_guide_shows_what_is_run_here(programs: Path, helper: ArenasProcess) -> None:
    """The Go example is the tests' client, and each line with grpcurl works."""
    guide = (ROOT / "docs" / "arenas-api.md").read_text()
    assert (ROOT / "tests" / "clients" / "go" / "main.go").read_text() in guide
    lines = [line for line in guide.splitlines() if line.startswith("grpcurl ")]
    script = "\n".join(["set -eu", f"at={helper.address()}", *lines])
    done = subprocess.run(
        ["sh", "-c", script],
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert len(lines) == 7 and base64.b64encode(b"hello").decode() in done.stdout
