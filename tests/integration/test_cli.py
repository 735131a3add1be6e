"""The command on real clusters: `up`, what it starts and leaves, and what the others then say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.up import Up, descendants, running, samepage, wait_until_gone

import samepage as client
from samepage.cli.cluster import store_directory

pytestmark = pytest.mark.needs("root", "move", "wp_tmpfs", "remap")

MIB = 2**20


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with running(tmp_path_factory.mktemp("up"), hosts=2) as up:
        yield up


@pytest.fixture
def node(up: Up) -> Iterator[client.Node]:
    with client.connect(up.cluster.hosts[0].directory) as node:
        yield node


def stores(directory: Path, hosts: int) -> list[Path]:
    return [store_directory(directory, f"host-{number}") for number in range(1, hosts + 1)]


def test_the_cluster_file_says_where_everything_is(up: Up) -> None:
    content = json.loads((up.directory / "cluster.json").read_text())
    assert [host["name"] for host in content["hosts"]] == ["host-1", "host-2"]
    for host in content["hosts"]:
        assert (Path(host["dir"]) / "merger.sock").is_socket()
        assert (Path(host["dir"]) / "scanner.sock").is_socket()
        assert (Path(host["dir"]) / "arenas-api.sock").is_socket()
    addresses = [content["index"]]
    services = ("merger", "scanner", "arenas")
    addresses += [host[service] for host in content["hosts"] for service in services]
    assert len(set(addresses)) == 7
    assert all(address.startswith("127.0.0.1:") for address in addresses)


def test_what_is_secret_is_for_the_owner(up: Up) -> None:
    for path in (up.directory / "secret", up.directory / "host-1" / "merger-api.sock"):
        assert path.stat().st_mode & 0o077 == 0


def test_status(up: Up) -> None:
    done = samepage("status", "--dir", up.directory, "--json")
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["problems"]) == (0, [])
    assert [host["name"] for host in answer["hosts"]] == ["host-1", "host-2"]
    assert [host["merger"]["node"] for host in answer["hosts"]] == ["host-1", "host-2"]
    assert all(host["scanner"]["merger_connected"] for host in answer["hosts"])
    assert [host["arenas"]["node"] for host in answer["hosts"]] == ["host-1", "host-2"]
    assert [host["account"]["node"] for host in answer["hosts"]] == ["host-1", "host-2"]
    assert "embedded" in answer["index"]["store"]
    table = samepage("status", "--dir", up.directory)
    assert table.returncode == 0 and "serving" in table.stdout and "host-2" in table.stdout


def test_a_host_alone(up: Up) -> None:
    done = samepage(
        "status", "--json", env={**os.environ, "SAMEPAGE_DIR": f"{up.directory}/host-2"}
    )
    assert [host["name"] for host in json.loads(done.stdout)["hosts"]] == ["host-2"]


def test_sharing_from_the_command(up: Up, node: client.Node) -> None:
    content = os.urandom(4 * MIB)
    with (
        node.create_arena("one", size="4MiB", domain="cli") as one,
        node.create_arena("two", size="4MiB", domain="cli") as two,
    ):
        one.buffer[:] = two.buffer[:] = content
        done = samepage("share", "--dir", up.directory, "--domain", "cli", "--json")
        answer = {report["host"]: report for report in json.loads(done.stdout)}
        assert done.returncode == 0 and answer["host-1"]["shared"] == 2048
        assert one.stats().shared == two.stats().shared == 1024
        listed = samepage("arenas", "--dir", up.directory, "--domain", "cli", "--json")
        arenas = {arena["name"]: arena for arena in json.loads(listed.stdout)}
        assert arenas["one"]["host"] == "host-1" and arenas["one"]["pid"] == os.getpid()
        assert arenas["one"]["saved_bytes"] == arenas["two"]["saved_bytes"] == 2 * MIB
        assert one.buffer == two.buffer == content
        told = samepage("status", "--dir", up.directory / "host-1", "--json")
        account = json.loads(told.stdout)["hosts"][0]["account"]
        assert account["saved_bytes"] == account["processes"][0]["saved_bytes"] == 4 * MIB
        assert [arena["proportional_bytes"] for arena in account["arenas"]] == [2 * MIB] * 2
        assert account["domains"][0]["name"] == "cli"
        table = samepage("arenas", "--dir", up.directory)
        assert table.returncode == 0 and "100%" in table.stdout
    assert json.loads(samepage("arenas", "--dir", up.directory, "--json").stdout) == []


def test_policies_are_changed_on_one_host_or_all(up: Up) -> None:
    changed = samepage("policy", "cpu_percent=5", "--host", "host-2", "--dir", up.directory)
    assert changed.returncode == 0, changed.stderr
    shown = samepage("policy", "--dir", up.directory, "--json")
    scanners = [one for one in json.loads(shown.stdout) if one["daemon"] == "scanner"]
    assert {one["host"]: one["cpu_percent"] for one in scanners} == {"host-1": 10, "host-2": 5}
    changed = samepage("policy", "cpu_percent=10", "--dir", up.directory, "--json")
    assert [one["cpu_percent"] for one in json.loads(changed.stdout) if "cpu_percent" in one] == [
        10,
        10,
    ]


def test_policies_that_are_refused(up: Up) -> None:
    done = samepage("policy", "cpu_percent=900", "--dir", up.directory)
    assert done.returncode == 2
    assert "cpu_percent must be more than 0 and at most 100" in done.stderr
    done = samepage("policy", "--host", "host-3", "--dir", up.directory)
    assert done.returncode == 1
    assert "there is no host 'host-3' here; there is host-1, host-2" in done.stderr


def test_one_arena_of_one_host(up: Up, node: client.Node) -> None:
    with (
        node.create_arena("left", size="1MiB", domain="cli") as left,
        node.create_arena("right", size="1MiB", domain="cli") as right,
    ):
        left.buffer[:] = right.buffer[:] = os.urandom(MIB)
        done = samepage("share", "host-1/left", "--dir", up.directory, "--domain", "cli", "--json")
        (report,) = json.loads(done.stdout)
        assert (report["host"], report["pages"], report["shared"]) == ("host-1", 256, 256)
        table = samepage("share", "left", "--dir", up.directory, "--domain", "cli")
        assert table.returncode == 0 and "no mapping" in table.stdout


@pytest.mark.parametrize(
    ("arena", "text"),
    [("none", "no arena 'none'"), ("host-1/none", "none"), ("host-9/a", "no host 'host-9'")],
)
def test_what_is_not_there(up: Up, arena: str, text: str) -> None:
    done = samepage("share", arena, "--dir", up.directory)
    assert done.returncode == 1 and text in done.stderr


def test_the_api_from_python(up: Up, node: client.Node) -> None:
    with node.create_arena("a", size="1MiB"):
        (info,) = node.arenas()
        assert (info.name, info.domain, info.size, info.pid) == ("a", "default", MIB, os.getpid())
        stats = node.stats()
        assert (stats.node, stats.arenas) == ("host-1", 1)
        assert stats.cpu_seconds > 0


def test_the_api_is_for_operators(up: Up) -> None:
    """An ordinary user is told so, whatever the directories' modes are."""
    code = (
        "import os, sys; from pathlib import Path; from samepage import NotRunningError, rpc\n"
        "os.setuid(65534)\n"
        "try: rpc.socket_address(Path(sys.argv[1]), rpc.MERGER_SOCKET)\n"
        "except NotRunningError as error: sys.exit('operators' not in str(error))\n"
        "sys.exit(2)"
    )
    done = subprocess.run([sys.executable, "-c", code, up.directory / "host-1"], check=False)
    assert done.returncode == 0


def test_doctor_finds_the_daemons(up: Up) -> None:
    done = samepage("doctor", "--dir", up.directory, "--json")
    states = {check["name"]: check["state"] for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0
    assert states["daemons of host-1"] == states["daemons of host-2"] == states["index"] == "ok"


def test_a_second_one_in_the_same_directory_is_refused(up: Up) -> None:
    done = samepage("up", "--dir", up.directory)
    assert done.returncode == 2 and "runs in" in done.stderr
    assert samepage("status", "--dir", up.directory).returncode == 0


@pytest.mark.parametrize("daemon", ["host-1/merger", "host-1/scanner", "host-1/arenas", "index"])
def test_a_killed_daemon_comes_back_where_it_was(tmp_path: Path, daemon: str) -> None:
    with running(tmp_path) as up:
        before = up.cluster
        killed = up.daemons()[daemon]
        os.kill(killed, signal.SIGKILL)
        up.wait_for("message", f"{daemon} was ended by signal SIGKILL")
        up.wait_for("message", f"{daemon} serves again")
        assert up.daemons()[daemon] != killed
        assert json.loads((tmp_path / "cluster.json").read_text()) == before.to_json()
        assert samepage("status", "--dir", tmp_path).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_after_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    up = Up(tmp_path, hosts=2)
    processes = descendants(up.process.pid)
    assert len(processes) >= 7
    assert all(store.is_dir() for store in stores(tmp_path, 2))
    up.process.send_signal(number)
    up.process.communicate(timeout=30)
    assert up.process.returncode == 0
    wait_until_gone(processes, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "secret"]
    assert not any(store.exists() for store in stores(tmp_path, 2))


def test_nothing_is_left_when_it_is_killed(tmp_path: Path) -> None:
    up = Up(tmp_path, hosts=1)
    processes = descendants(up.process.pid)
    up.process.kill()
    up.process.communicate()
    wait_until_gone(processes)
    assert not any(store.exists() for store in stores(tmp_path, 1))
    with running(tmp_path):
        assert samepage("status", "--dir", tmp_path).returncode == 0


def test_ready_is_a_line_of_its_own(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "samepage", "up", "--dir", tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    _, messages = process.communicate(timeout=30)
    assert process.returncode == 0
    assert f"host-1: SAMEPAGE_DIR={tmp_path}/host-1" in messages


def demo_files(directory: Path) -> Path:
    files = directory / "files"
    files.mkdir()
    for name, size in (("a", 3 * MIB), ("b", MIB + 1), ("c", 1)):
        # A file of one zero would be a page of zeros, which takes no slot.
        (files / name).write_bytes(b"c" + os.urandom(size - 1))
    return files


@pytest.fixture
def place() -> Iterator[Path]:
    """Where a demo makes its directory; short, for the sockets in it."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def test_the_demo(tmp_path: Path, place: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(place)}
    done = samepage("demo", "--files", demo_files(tmp_path), "--json", env=environment)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ok"]
    assert [check["files_equal"] and check["own_intact"] for check in answer["checks"]] == [
        True
    ] * 6
    assert answer["write"]["changed"] == ["host-1/worker-1"]
    assert answer["write"]["made_private"] >= answer["write"]["pages"] == 64
    files_pages = 768 + 257 + 1
    assert answer["sharing"]["shared_pages"] == 6 * files_pages
    for host in answer["hosts"]:
        assert host["after"]["store"] == 4096 * files_pages
        saved = host["before"]["total"] - host["after"]["total"]
        assert saved > 1.9 * 4096 * files_pages
    assert answer["overlap"]["pages"] == files_pages
    assert list(place.iterdir()) == []


def test_the_demo_for_people(tmp_path: Path) -> None:
    done = samepage(
        "demo", "--files", demo_files(tmp_path) / "a", env={**os.environ, "COLUMNS": "200"}
    )
    assert done.returncode == 0, done.stderr
    for text in ("host-2", "saved", "CPU time", "memory that changed: host-1/worker-1", "SHA-256"):
        assert text in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_cleans_up_when_it_is_interrupted(place: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "samepage", "demo", "--size", "64MiB"],
        env={**os.environ, "TMPDIR": str(place)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    workers = _wait_for_workers(process.pid)
    processes = descendants(process.pid)
    (directory,) = place.glob("samepage-demo-*")
    assert all(store.is_dir() for store in stores(directory, 2))
    process.send_signal(number)
    process.communicate(timeout=40)
    assert process.returncode == 130
    assert workers <= set(processes)
    wait_until_gone(processes, 0)
    assert list(place.iterdir()) == []
    assert not any(store.exists() for store in stores(directory, 2))


def _wait_for_workers(demo: int) -> set[int]:
    """Return the demo's workers when all six run.

    Raises:
        TimeoutError: they do not, after half a minute.
    """
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = {
            pid
            for pid in descendants(demo)
            if b"samepage.cli.demo.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        }
        if len(found) == 6:
            return found
    raise TimeoutError("no workers")


def test_the_demo_fails_when_bytes_differ(tmp_path: Path) -> None:
    """A file that changes under the demo is found by the checks."""
    files = demo_files(tmp_path)
    code = (
        "import sys; from samepage.cli.demo import workers\n"
        "start = workers.WorkerProcess.start\n"
        "async def change(self, inputs):\n"
        "    await start(self, inputs)\n"
        "    open(inputs[1].path, 'r+b').write(b'other')\n"
        "workers.WorkerProcess.start = change\n"
        "from samepage.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "demo", "--files", files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "the files differ" in done.stdout and "the demo failed" in done.stderr
