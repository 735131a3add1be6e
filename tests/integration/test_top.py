"""`samepage top` as people and programs run it: in a terminal, in a pipe, until Ctrl-C."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from application import PAGE, Application
from helpers.up import Up, running, samepage, wait_until_gone

pytestmark = pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap")

PAGES = 300
_ALTERNATE_SCREEN, _BACK = b"\x1b[?1049h", b"\x1b[?1049l"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with running(tmp_path_factory.mktemp("top"), hosts=2) as up:
        yield up


@pytest.fixture(scope="module")
def sharing(cluster: Up) -> Iterator[tuple[Application, Application]]:
    host = cluster.host()
    with Application(host) as one, Application(host) as two:
        for application, name in ((one, "left"), (two, "right")):
            application.call("create", name, PAGES, "shown")
            application.call("fill", name, 1)
        two.call("share", "right")
        yield one, two


def command(cluster: Up, *more: str) -> list[str]:
    return [sys.executable, "-m", "samepage", "top", "--dir", str(cluster.directory), *more]


class Terminal:
    """`samepage top` in a terminal of its own."""

    def __init__(self, command: list[str], lines: int, columns: int) -> None:
        self._end, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        environment = {**os.environ, "TERM": "xterm"}
        for name in ("COLUMNS", "LINES"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=environment,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self.output = b""

    def until(self, text: bytes) -> None:
        """Read on until it has shown this."""
        while text not in self.output:
            self.output += os.read(self._end, 65536)

    def press(self, key: bytes) -> None:
        """Type something."""
        os.write(self._end, key)

    def rest(self) -> int:
        """Read what is left; return the exit code."""
        with contextlib.suppress(OSError):
            while part := os.read(self._end, 65536):
                self.output += part
        return self.process.wait(20)

    def close(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        os.close(self._end)


@contextlib.contextmanager
def terminal(command: list[str], lines: int = 30, columns: int = 100) -> Iterator[Terminal]:
    shown = Terminal(command, lines, columns)
    try:
        yield shown
    finally:
        shown.close()


def test_live_until_ctrl_c(cluster: Up, sharing: tuple[Application, Application]) -> None:
    with terminal(command(cluster, "--interval", "0.1")) as shown:
        shown.until(b"right")
        assert _ALTERNATE_SCREEN in shown.output
        sharing[0].call("create", "later", 1, "shown")
        shown.until(b"later")
        shown.press(b"\x03")
        assert shown.rest() == 0
        assert _BACK in shown.output and b"Traceback" not in shown.output
    sharing[0].call("close", "later")


def test_sigterm_gives_the_screen_back(
    cluster: Up, sharing: tuple[Application, Application]
) -> None:
    with terminal(command(cluster)) as shown:
        shown.until(b"saved")
        shown.process.send_signal(signal.SIGTERM)
        assert shown.rest() == 128 + signal.SIGTERM
        assert _BACK in shown.output


def test_a_small_terminal(cluster: Up, sharing: tuple[Application, Application]) -> None:
    with terminal(command(cluster, "--interval", "0.1"), lines=4, columns=30) as shown:
        shown.until(b"1 of 2")
        shown.press(b"\x03")
        assert shown.rest() == 0
        assert b"left" not in shown.output and b"Traceback" not in shown.output


def test_once(cluster: Up, sharing: tuple[Application, Application]) -> None:
    for arguments in ((), ("--once",)):
        done = samepage("top", "--dir", cluster.directory, *arguments)
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout
        for text in ("host-1", "host-2", "left", "right", "shown", str(sharing[0].pid)):
            assert text in done.stdout


def test_once_as_json(cluster: Up, sharing: tuple[Application, Application]) -> None:
    done = samepage("top", "--dir", cluster.directory, "--once", "--json", "--domain", "shown")
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    first, second = json.loads(line)["hosts"]
    assert [first["name"], second["name"]] == ["host-1", "host-2"]
    account = first["account"]
    assert account["saved_bytes"] == PAGES * PAGE
    assert {arena["name"]: arena["pid"] for arena in account["arenas"]} == {
        "left": sharing[0].pid,
        "right": sharing[1].pid,
    }
    assert second["account"]["arenas"] == [] and second["scanner"]["node"] == "host-2"


def test_a_line_each_interval(cluster: Up, sharing: tuple[Application, Application]) -> None:
    lines = subprocess.Popen(
        command(cluster, "--json", "--interval", "0.1"), stdout=subprocess.PIPE, text=True
    )
    assert lines.stdout is not None
    snapshots = [json.loads(lines.stdout.readline()) for _ in range(3)]
    lines.send_signal(signal.SIGINT)
    assert lines.wait(20) == 0
    lines.stdout.close()
    assert snapshots[0]["time"] < snapshots[1]["time"] < snapshots[2]["time"]
    assert snapshots[0]["hosts"][0]["swaps_per_second"] is None
    assert snapshots[2]["hosts"][0]["swaps_per_second"] == 0
    assert all(snapshot["problems"] == [] for snapshot in snapshots)


def test_a_merger_that_is_away_is_said(cluster: Up) -> None:
    pid = cluster.daemons()["host-2/merger"]
    lines = subprocess.Popen(
        command(cluster, "--json", "--interval", "0.1"), stdout=subprocess.PIPE, text=True
    )
    assert lines.stdout is not None
    assert json.loads(lines.stdout.readline())["problems"] == []
    os.kill(pid, signal.SIGKILL)
    wait_until_gone([pid])
    away = (json.loads(line) for line in lines.stdout)
    first = next(snapshot for snapshot in away if snapshot["problems"])
    assert first["hosts"][1]["account"] is None and first["hosts"][0]["account"] is not None
    back = next(snapshot for snapshot in away if not snapshot["problems"])
    assert back["hosts"][1]["account"]["node"] == "host-2"
    lines.send_signal(signal.SIGINT)
    assert lines.wait(20) == 0
    lines.stdout.close()


def test_no_daemon_there(tmp_path: Path) -> None:
    done = samepage("top", "--dir", tmp_path)
    assert done.returncode == 3 and "no daemon serves" in done.stderr
