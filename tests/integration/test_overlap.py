"""`samepage overlap` on real hosts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from application import PAGE, Application
from helpers.up import Up, running, samepage

pytestmark = [pytest.mark.needs("root", "userfaultfd"), pytest.mark.timeout(120)]

_PAGES = 300


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    directory = tmp_path_factory.mktemp("up")
    with (
        running(directory, 2) as up,
        Application(up.host(1)) as one,
        Application(up.host(2)) as two,
    ):
        for application, own in ((one, 2), (two, 3)):
            application.call("create", "common", _PAGES)
            application.call("fill", "common", 1)
            application.call("create", "own", _PAGES)
            application.call("fill", "own", own)
            application.call("share", "common")
            application.call("share", "own")
        _wait_until_published(directory)
        yield up


def _wait_until_published(directory: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        hosts = json.loads(samepage("status", "--json", "--dir", directory).stdout)["hosts"]
        if all(host["scanner"]["published"] == 2 * _PAGES for host in hosts):
            return
    raise TimeoutError("the scanners did not publish what they hold")


def overlap(up: Up, *arguments: str) -> dict[str, Any]:
    done = samepage("overlap", *arguments, "--json", "--dir", up.directory)
    assert done.returncode == 0, done.stderr
    return {host["name"]: host for host in json.loads(done.stdout)["hosts"]}


def test_of_hosts(up: Up) -> None:
    found = overlap(up)
    assert found["host-1"]["distinct_bytes"] == 2 * _PAGES * PAGE
    assert found["host-1"]["overlap_bytes"] == {"host-2": _PAGES * PAGE}
    assert found["host-2"]["overlap_bytes"] == {"host-1": _PAGES * PAGE}


def test_of_an_arena(up: Up) -> None:
    assert overlap(up, "common", "--host", "host-1")["host-1"]["overlap_bytes"] == {
        "host-2": _PAGES * PAGE
    }
    found = overlap(up, "own")
    assert [found[name]["overlap_bytes"] for name in ("host-1", "host-2")] == [{}, {}]


def test_for_people_and_as_a_picture(up: Up, tmp_path: Path) -> None:
    picture = tmp_path / "overlap.svg"
    done = samepage("overlap", "--plot", str(picture), "--dir", up.directory)
    assert done.returncode == 0, done.stderr
    assert "1.2 MiB 50%" in done.stdout
    assert "<!-- 50% -->" in picture.read_text()


@pytest.mark.parametrize(
    ("arguments", "text", "code"),
    [
        (("nothing",), "no arena 'nothing' in domain 'default'", 1),
        (("--host", "host-9"), "there is no host 'host-9' here", 1),
        (("--plot", "out.gif"), "give a name that ends with .png or .svg", 2),
    ],
)
def test_wrong_arguments(up: Up, arguments: tuple[str, ...], text: str, code: int) -> None:
    done = samepage("overlap", *arguments, "--dir", up.directory)
    assert done.returncode == code
    assert text in done.stderr
