"""The command's parts that need no daemon, and its words when there is none."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.up import samepage, wait_until_gone

from samepage import native
from samepage.cli import daemons, doctor, places, status
from samepage.cli.child import Child, ChildError
from samepage.cli.demo import files, measure
from samepage.errors import InvalidArgumentError, NotRunningError

PAGE = 4096

_DAEMON = """
import json, os, signal, sys
from pathlib import Path

draft = Path(os.environ["READY"] + ".draft")
address = os.environ["LISTEN"].replace(":0", ":4321")
draft.write_text(json.dumps({"address": address, "pid": os.getpid()}))
draft.replace(os.environ["READY"])
if os.environ.get("STUBBORN"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True:
    signal.pause()
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Child:
    (tmp_path / "fake_daemon.py").write_text(_DAEMON)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ready = tmp_path / "ready"
    env = {"READY": str(ready), "LISTEN": "127.0.0.1:0"}
    return Child("host-1/fake", "fake_daemon", env, ready, tmp_path / "log", "LISTEN")


async def test_a_child_is_started_and_ended(child: Child) -> None:
    await child.start()
    assert child.address == "127.0.0.1:4321"
    pid = child.pid
    assert os.getpgid(pid) == pid
    await child.stop()
    assert not Path(f"/proc/{pid}").exists()
    assert not child.ready_file.exists()


async def test_a_child_that_dies_comes_back_with_its_address(child: Child) -> None:
    await child.start()
    said: asyncio.Queue[str] = asyncio.Queue()
    keeper = asyncio.create_task(child.keep(said.put_nowait))
    first = child.pid
    os.kill(first, signal.SIGKILL)
    assert await said.get() == "host-1/fake was ended by signal SIGKILL; starting it again"
    assert await said.get() == "host-1/fake serves again"
    assert child.pid != first
    assert child.env["LISTEN"] == child.address == "127.0.0.1:4321"
    keeper.cancel()
    await asyncio.wait({keeper})
    await child.stop()


async def test_a_child_that_ignores_the_signal_is_killed(
    child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samepage.cli.child.GRACE_SECONDS", 0.1)
    child.env["STUBBORN"] = "1"
    await child.start()
    pid = child.pid
    await child.stop()
    assert not Path(f"/proc/{pid}").exists()


async def test_a_child_that_does_not_start_says_why(child: Child) -> None:
    child.module = "no_such_module"
    with pytest.raises(ChildError, match=r"host-1/fake ended with exit code 1\n.*no_such_module"):
        await child.start()


_PARENT = """
import asyncio, sys
from pathlib import Path
from samepage.cli.child import Child

async def main():
    ready = Path(sys.argv[1]) / "ready"
    env = {"READY": str(ready), "LISTEN": "127.0.0.1:0"}
    child = Child("fake", "fake_daemon", env, ready, Path(sys.argv[1]) / "log", "LISTEN")
    await child.start()
    print(child.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_child_ends_with_its_parent(child: Child, tmp_path: Path) -> None:
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", _PARENT, str(tmp_path)),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    parent.kill()
    await parent.wait()
    await asyncio.to_thread(wait_until_gone, [pid])


def test_the_hosts_of_a_directory(tmp_path: Path) -> None:
    assert places.find(tmp_path) == places.Cluster((places.Host("", tmp_path),))
    cluster = places.Cluster(
        (
            places.Host(
                "host-1",
                tmp_path / "host-1",
                "127.0.0.1:1",
                "127.0.0.1:2",
                "127.0.0.1:3",
                {"merger": "127.0.0.1:4"},
            ),
        ),
        "127.0.0.1:5",
        "127.0.0.1:6",
    )
    (tmp_path / "cluster.json").write_text(json.dumps(cluster.to_json()))
    assert places.find(tmp_path) == cluster


def test_the_directory_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMEPAGE_DIR", str(tmp_path))
    assert places.find(None).hosts[0].directory == tmp_path
    monkeypatch.setenv("SAMEPAGE_DIR", str(tmp_path / "none"))
    with pytest.raises(NotRunningError, match="samepage up"):
        places.find(None)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"index": "", "hosts": [{}]}', "\0"])
def test_a_cluster_file_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "cluster.json").write_text(content)
    with pytest.raises(InvalidArgumentError, match=r"cluster\.json"):
        places.find(tmp_path)


def test_given_files_are_laid_out_page_by_page(tmp_path: Path) -> None:
    for name, size in (("a", 1), ("b", PAGE), ("c", PAGE + 1), ("d", 0), ("e", 7)):
        (tmp_path / name).write_bytes(os.urandom(size))
    found = files.choose([tmp_path], 0)
    assert [(Path(one.path).name, one.offset // PAGE, one.size) for one in found] == [
        ("a", 0, 1),
        ("b", 1, PAGE),
        ("c", 2, PAGE + 1),
        ("e", 4, 7),
    ]
    assert files.arena_bytes(found) == 5 * PAGE


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="nothing to load"):
        files.choose([tmp_path], 0)
    with pytest.raises(InvalidArgumentError, match="there is no file"):
        files.choose([tmp_path / "none"], 0)


def test_the_largest_files_of_the_machine() -> None:
    limit = 8 * 2**20 + 5
    found = files.choose([], limit)
    assert sum(one.size for one in found) == limit
    assert len({os.stat(one.path).st_ino for one in found}) == len(found)


def test_digests_of_changed_files(tmp_path: Path) -> None:
    content = os.urandom(2 * PAGE + 3)
    (tmp_path / "a").write_bytes(content)
    one = files.Input(str(tmp_path / "a"), 0, len(content))
    assert one.digest() == hashlib.sha256(content).hexdigest()
    changed = b"new" + content[3:PAGE] + b"new" + content[PAGE + 3 :]
    assert one.digest(b"new", 2) == hashlib.sha256(changed).hexdigest()
    part = files.Input(one.path, 0, 2)
    assert part.digest(b"new", 1) == hashlib.sha256(b"ne").hexdigest()


def test_measures_come_from_the_kernel(tmp_path: Path) -> None:
    memory = measure.memory([os.getpid()], tmp_path / "none")
    assert memory.pss > 2**20 and memory.store == 0
    assert memory.total == memory.pss - memory.pss_store
    assert measure.available_bytes() > 0
    before = measure.cpu_seconds(os.getpid())
    assert before > 0
    assert measure.cpu_seconds(2**22 + 1) == 0


def test_a_host_need_not_hold_arenas_for_others(tmp_path: Path) -> None:
    for address, away in (
        ("", "merger, scanner away"),
        ("127.0.0.1:1", "merger, scanner, arenas away"),
    ):
        found = daemons.host_status(places.Host("host-1", tmp_path, arenas=address))
        assert status._row(found)[:2] == ["host-1", away]
        assert sum("arenas-api.sock" in error for error in found.errors) == bool(address)


def test_no_daemons(tmp_path: Path) -> None:
    for command in ("status", "arenas", "share"):
        done = samepage(command, "--dir", tmp_path)
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr.startswith("samepage: no daemon serves")
        assert len(done.stderr.splitlines()) == 1


def test_wrong_usage(tmp_path: Path) -> None:
    for arguments in (["nonsense"], ["share", "--timeout", "soon"]):
        assert samepage(*arguments).returncode == 2
    for arguments, text in (
        (["up", "--dir", str(tmp_path), "--hosts", "0"], "1 to 64"),
        (["up", "--dir", "/proc/none"], "cannot use the directory"),
        (["up", "--dir", str(tmp_path / ("x" * 100))], "too long"),
        (["share", "--dir", str(tmp_path), "--timeout", "0"], "--timeout"),
        (["demo", "--size", "0"], "not positive"),
        (["demo", "--size", "lots"], "is no size"),
        (["demo", "--files", str(tmp_path / "none")], "there is no file"),
    ):
        done = samepage(*arguments)
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1].startswith("samepage: ") and text in done.stderr


def test_a_demo_that_needs_more_than_the_machine_has(tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    huge.touch()
    os.truncate(huge, measure.available_bytes())
    done = samepage("demo", "--files", huge)
    assert done.returncode == 1 and "load less" in done.stderr


def test_doctor_without_daemons(tmp_path: Path) -> None:
    done = samepage("doctor", "--json", "--dir", tmp_path)
    answer = json.loads(done.stdout)
    checks = {check["name"].split()[0]: check["state"] for check in answer["checks"]}
    assert done.returncode == (0 if answer["ok"] else 4)
    assert checks["kernel"] == "note"
    assert {"userfaultfd", "move", "wp_tmpfs", "remap", "vm.max_map_count"} <= set(checks)
    assert checks["daemons"] == "warning"


@pytest.mark.parametrize("feature", ["userfaultfd", "move"])
def test_doctor_says_what_still_works(tmp_path: Path, feature: str) -> None:
    environment = {**os.environ, "SAMEPAGE_DISABLE": feature}
    done = samepage("doctor", "--json", "--dir", tmp_path, env=environment)
    answer = json.loads(done.stdout)
    assert done.returncode == 4 and not answer["ok"]
    check = next(check for check in answer["checks"] if check["name"].startswith(feature))
    assert check["state"] == "missing" and "still work" in check["detail"]
    table = samepage("doctor", "--dir", tmp_path, env=environment)
    assert table.returncode == 4 and "missing" in table.stdout


@pytest.mark.needs("root", "userfaultfd")
def test_doctor_does_not_guess_for_an_ordinary_user() -> None:
    native.probe()  # loads the library, which the user below may not be able to read
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        found = doctor._features(places.Cluster(()))
        blind = [check for check in found if "cannot tell" in check.detail]
        os._exit(not (len(blind) >= 4 and {check.state for check in blind} == {"warning"}))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_version_and_help() -> None:
    assert samepage("--help").returncode == 0
    for command in ("up", "status", "arenas", "share", "doctor", "demo"):
        done = samepage(command, "--help")
        assert done.returncode == 0 and "--json" in done.stdout


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("cpu_percent", "NAME=VALUE"),
        ("speed=9", "there is no policy 'speed'; there are interval_seconds, "),
        ("cpu_percent=fast", "'fast' is not a number"),
        ("cpu_percent=inf", "'inf' is not a number"),
    ],
)
def test_policies_that_are_none(tmp_path: Path, change: str, text: str) -> None:
    done = samepage("policy", change, "--dir", tmp_path)
    assert done.returncode == 2
    assert text in done.stderr


def test_interrupted_while_it_still_imports(tmp_path: Path) -> None:
    """Ctrl-C is no traceback, however early: here inside the import of typer."""
    slow = "import sys\nprint('importing', flush=True)\nsys.stdin.read()\n"
    (tmp_path / "typer.py").write_text(slow)
    with subprocess.Popen(
        [Path(sys.executable).with_name("samepage"), "--version"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == ""
