"""Real applications, of different users and with different tokens, on a real host."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from application import Application, ApplicationError
from fakes.fake_token_api import FakeTokenApi
from helpers.up import Up, running
from helpers.waiting import until

from samepage.host import list_arenas

pytestmark = pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap")

PAGES = 200

POLICY = """
[[allow]]
domains = ["web", "common"]
uids = [1001, 1002]

[[allow]]
domains = ["data"]
uids = [1003]
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that other users may look into."""
    with tempfile.TemporaryDirectory(prefix="samepage-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextmanager
def host(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> Iterator[Up]:
    """A host whose merger and scanner have the same settings of identity."""
    with monkeypatch.context() as patch:
        for name, value in settings.items():
            for service in ("MERGER", "SCANNER"):
                patch.setenv(f"SAMEPAGE_{service}_{name.upper()}", str(value))
        with running(folder / "up") as up:
            yield up


def sharing(*applications: Application) -> list[int]:
    """How many pages each has shared, when all have the same bytes."""
    for application in applications:
        application.call("create", f"a-{application.pid}", PAGES)
        application.call("fill", f"a-{application.pid}", 1)
    for application in applications:
        application.call("share", f"a-{application.pid}")
    return [
        application.call("stats", f"a-{application.pid}")["shared"] for application in applications
    ]


def test_users_get_their_domains(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = folder / "policy.toml"
    policy.write_text(POLICY)
    with (
        host(folder, monkeypatch, identity="uid", identity_policy_file=policy) as up,
        Application(up.host(), user=1001) as one,
        Application(up.host(), user=1002) as two,
        Application(up.host(), user=1003) as three,
        Application(up.host()) as root,
    ):
        assert sharing(one, two, three) == [PAGES, PAGES, 0]
        assert one.call("domain", f"a-{one.pid}") == "web"
        assert three.call("domain", f"a-{three.pid}") == "data"
        found = {arena.name: arena.domain for arena in list_arenas(str(up.host()))}
        assert found == {f"a-{one.pid}": "web", f"a-{two.pid}": "web", f"a-{three.pid}": "data"}

        one.call("create", "named", PAGES, "common")
        assert one.call("domain", "named") == "common"
        with pytest.raises(
            ApplicationError, match="uid 1003 may not use the domain 'web'"
        ) as error:
            three.call("create", "stolen", PAGES, "web")
        assert error.value.kind == "PermissionDeniedError"
        # The daemons' own user is nobody special.
        with pytest.raises(ApplicationError, match="uid 0 may use no domain of this host"):
            root.call("create", "root", PAGES)

        # What the operator writes counts from the next arena on.
        policy.write_text(POLICY.replace('"common"', '"common", "data"'))
        one.call("create", "more", PAGES, "data")


async def test_tokens_give_domains(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = FakeTokenApi(folder)
    await api.start()
    files = {name: folder / name for name in ("shop-1", "shop-2", "blog", "mallory")}
    for name in ("shop-1", "shop-2", "blog"):
        files[name].write_text(api.admit(f"token of {name}", name.partition("-")[0]) + "\n")
    files["mallory"].write_text("a forged token")

    def applications(directory: Path) -> list[Application]:
        return [
            Application(directory, env={"SAMEPAGE_TOKEN_FILE": str(file)})
            for file in files.values()
        ]

    def scenario() -> None:
        with host(folder, monkeypatch, **api.settings) as up:
            shop_1, shop_2, blog, mallory = started = applications(up.host())
            try:
                assert sharing(shop_1, shop_2, blog) == [PAGES, PAGES, 0]
                assert shop_1.call("domain", f"a-{shop_1.pid}") == "shop"
                assert blog.call("domain", f"a-{blog.pid}") == "blog"
                with pytest.raises(ApplicationError, match="may not use the domain 'shop'"):
                    blog.call("create", "stolen", PAGES, "shop")
                with pytest.raises(ApplicationError, match="the token is not valid") as error:
                    mallory.call("create", "stolen", PAGES)
                assert error.value.kind == "PermissionDeniedError"

                # The kubelet has put a new token into the file.
                files["mallory"].write_text(api.admit("token of mallory", "mallory"))
                mallory.call("create", "own", PAGES)
                assert mallory.call("domain", "own") == "mallory"
                with (
                    Application(up.host()) as nobody,
                    pytest.raises(ApplicationError, match="set SAMEPAGE_TOKEN_FILE"),
                ):
                    nobody.call("create", "own", PAGES)
            finally:
                for application in started:
                    application.end()

    await asyncio.to_thread(scenario)
    await api.stop()


@pytest.fixture
async def api(folder: Path) -> AsyncIterator[FakeTokenApi]:
    api = FakeTokenApi(folder)
    await api.start()
    yield api
    await api.stop()


async def test_a_merger_that_restarts_while_the_api_server_is_away(
    folder: Path, monkeypatch: pytest.MonkeyPatch, api: FakeTokenApi
) -> None:
    """Nobody's bytes change, and all is shared again once the API server is back."""
    token = folder / "token"
    token.write_text(api.admit("good", "shop"))
    env = {"SAMEPAGE_TOKEN_FILE": str(token)}
    with (
        host(folder, monkeypatch, **api.settings) as up,
        Application(up.host(), env=env) as one,
        Application(up.host(), env=env) as two,
    ):
        assert await asyncio.to_thread(sharing, one, two) == [PAGES, PAGES]
        names = {application: f"a-{application.pid}" for application in (one, two)}
        before = [application.call("digest", name) for application, name in names.items()]

        await api.stop()
        os.kill(up.daemons()["host-1/merger"], signal.SIGKILL)
        await asyncio.to_thread(up.wait_for, "message", "merger")
        await until(
            lambda: "token refused" in (up.directory / "logs/host-1-merger.log").read_text()
        )

        def refused() -> bool:
            """Whether the reason is the API server; the agent may not be back at the merger yet."""
            with pytest.raises(ApplicationError) as error:
                one.call("create", "more", PAGES)
            assert error.value.kind == "ServiceUnavailableError"
            return "cannot be checked now" in str(error.value)

        await until(refused)
        assert [app.call("digest", name) for app, name in names.items()] == before
        assert [app.call("stats", name)["shared"] for app, name in names.items()] == [PAGES] * 2

        await api.start()
        await until(lambda: len(list_arenas(str(up.host()))) == 2)
        one.call("fill", names[one], 2, 0, PAGES // 2)
        two.call("fill", names[two], 2, 0, PAGES // 2)
        for application, name in names.items():
            await asyncio.to_thread(application.call, "share", name)
        assert [app.call("stats", name)["shared"] for app, name in names.items()] == [PAGES] * 2
        assert one.call("digest", names[one]) == two.call("digest", names[two])
