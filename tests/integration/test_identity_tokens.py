"""Tokens: what the API server says of them, and what comes of it for a connection."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fakes.fake_token_api import FakeTokenApi

from samepage.daemon.config import ConfigError
from samepage.daemon.identity import (
    DeniedError,
    Identity,
    IdentitySettings,
    choose_domain,
    make_identity,
    metrics,
)


@dataclass(eq=False)
class Caller:
    """A process, by what the kernel says of it."""

    uid: int = 1000
    pid: int = 0
    version: int = 3
    groups: tuple[str, ...] | None = None
    gids: frozenset[int] = field(default_factory=frozenset)
    closed: bool = False

    def in_control_group(self, *names: str) -> bool | None:
        return None if self.groups is None else not set(names).isdisjoint(self.groups)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[FakeTokenApi]:
    api = FakeTokenApi(tmp_path)
    await api.start()
    yield api
    await api.stop()


@pytest.fixture
async def identity(api: FakeTokenApi) -> AsyncIterator[Identity]:
    identity = make_identity(settings(api))
    yield identity
    await identity.close()


def settings(api: FakeTokenApi, **others: Any) -> IdentitySettings:
    return IdentitySettings(**(api.settings | others))


async def shown(identity: Identity, token: str, caller: Caller | None = None) -> Caller:
    """A connection that has shown a token."""
    caller = caller or Caller()
    review = identity.present(caller, token.encode())
    if review is not None:
        await review
    return caller


def refusal(identity: Identity, caller: Caller, wanted: str = "") -> tuple[int, str]:
    with pytest.raises(DeniedError) as denied:
        identity.domain(caller, wanted)
    error, text = denied.value.args
    return error, text


async def test_a_good_token(api: FakeTokenApi, identity: Identity) -> None:
    caller = await shown(identity, api.admit("good", "shop"))
    assert identity.domain(caller, "") == identity.domain(caller, "shop") == "shop"
    error, text = refusal(identity, caller, "other")
    assert error == errno.EACCES
    assert "service account shop/default (uid 1000) may not use the domain 'other'" in text


async def test_no_token_at_all(identity: Identity) -> None:
    error, text = refusal(identity, Caller())
    assert (error, "set SAMEPAGE_TOKEN_FILE" in text) == (errno.EACCES, True)
    error, text = refusal(identity, Caller(version=2))
    assert (error, "library does not know of: upgrade it" in text) == (errno.EACCES, True)


@pytest.mark.parametrize(
    ("token", "why"),
    [
        ("forged", "the token is not valid: invalid bearer token, or it has expired"),
        ("expired", "the token is not valid: invalid bearer token, or it has expired"),
        ("elsewhere", r"the token is not valid: token audiences ['vault'] is invalid"),
        ("person", "the token is jane's, which is no service account"),
        ("umlaut ü", "what was shown is no token"),
    ],
)
async def test_tokens_that_will_not_do(
    api: FakeTokenApi, identity: Identity, token: str, why: str
) -> None:
    api.admit("expired", "shop")
    del api.tokens["expired"]
    api.admit("elsewhere", "shop", audience="vault")
    api.tokens["person"] = ("samepage", "jane", {})
    caller = await shown(identity, token)
    error, text = refusal(identity, caller)
    assert error == errno.EACCES
    assert why in text


async def test_an_api_server_that_does_not_look_at_audiences(
    api: FakeTokenApi, identity: Identity
) -> None:
    """Such a one says nothing of audiences: the token may be for anybody."""
    user = {"username": "system:serviceaccount:shop:default"}
    api.answer = {"status": {"authenticated": True, "user": user}}
    error, text = refusal(identity, await shown(identity, "any"))
    assert (error, "not for the audience 'samepage'" in text) == (errno.EACCES, True)


@pytest.mark.parametrize("answer", [[], {}, {"status": 3}, {"status": {"authenticated": "yes"}}])
async def test_answers_that_are_no_reviews(
    api: FakeTokenApi, identity: Identity, answer: object
) -> None:
    api.answer = answer
    caller = await shown(identity, api.admit("good", "shop"))
    assert refusal(identity, caller)[0] in (errno.EACCES, errno.EAGAIN)


async def test_decisions_are_counted(api: FakeTokenApi, identity: Identity) -> None:
    good = await shown(identity, api.admit("good", "shop"))
    choose_domain(identity, good, "")
    api.admit("late", "shop")
    await api.stop()
    late = await shown(identity, "late")
    for caller, wanted in ((good, "other"), (Caller(), ""), (late, "")):
        with pytest.raises(DeniedError):
            choose_domain(identity, caller, wanted)
    (metric,) = metrics.collect(identity)
    counts = {sample.labels["outcome"]: sample.value for sample in metric.samples}
    assert counts == {"allowed": 1, "denied": 2, "unknown": 1}


async def test_while_the_api_server_is_away_nobody_new_gets_in(
    api: FakeTokenApi, identity: Identity
) -> None:
    inside = await shown(identity, api.admit("inside", "shop"))
    api.admit("late", "shop")
    await api.stop()
    caller = await shown(identity, "late")
    error, text = refusal(identity, caller)
    assert error == errno.EAGAIN
    assert "cannot be checked now: the Kubernetes API server does not answer; try again" in text
    # Who was in stays in, and the same token still counts.
    assert identity.domain(await shown(identity, "inside", inside), "") == "shop"
    assert identity.domain(await shown(identity, "inside"), "") == "shop"
    await api.start()
    assert identity.domain(await shown(identity, "late", caller), "") == "shop"


@pytest.mark.parametrize("status", [401, 403, 500, 302])
async def test_an_api_server_that_does_not_answer_us(
    api: FakeTokenApi, identity: Identity, status: int
) -> None:
    api.status = status
    caller = await shown(identity, api.admit("good", "shop"))
    assert refusal(identity, caller)[0] == errno.EAGAIN
    api.status = 0
    assert identity.domain(await shown(identity, "good", caller), "") == "shop"


async def test_an_impostor_of_the_api_server_is_not_asked(
    api: FakeTokenApi, identity: Identity
) -> None:
    real = api.ca_file.read_bytes()
    api.renew()
    changed = api.ca_file.read_bytes()
    api.ca_file.write_bytes(real)
    caller = await shown(identity, api.admit("good", "shop"))
    assert refusal(identity, caller)[0] == errno.EAGAIN
    assert api.reviews == []
    # A new authority is taken without a restart.
    api.ca_file.write_bytes(changed)
    assert identity.domain(await shown(identity, "good", caller), "") == "shop"


async def test_the_daemons_own_token_is_read_anew(api: FakeTokenApi, identity: Identity) -> None:
    good = api.token_file.read_text()
    api.token_file.write_text("an old one")
    caller = await shown(identity, api.admit("good", "shop"))
    assert refusal(identity, caller)[0] == errno.EAGAIN
    api.token_file.write_text(good)
    assert identity.domain(await shown(identity, "good", caller), "") == "shop"


async def test_the_api_server_is_asked_once_a_token(api: FakeTokenApi, identity: Identity) -> None:
    callers = [await shown(identity, api.admit("good", "shop")) for _ in range(5)]
    for caller in callers:
        await shown(identity, "good", caller)
    await shown(identity, "forged")
    await shown(identity, "forged")
    assert api.reviews == ["good", "forged"]


async def test_without_a_cache_it_is_asked_each_time(api: FakeTokenApi) -> None:
    identity = make_identity(settings(api, token_cache_seconds=0.0))
    api.admit("good", "shop")
    for _ in range(3):
        await shown(identity, "good")
    assert len(api.reviews) == 3
    await identity.close()


async def test_a_token_of_another_node(api: FakeTokenApi) -> None:
    identity = make_identity(settings(api, token_node="node-1"))
    api.admit("here", "shop", node_name="node-1")
    api.admit("there", "shop", node_name="node-2")
    assert identity.domain(await shown(identity, "here"), "") == "shop"
    _, text = refusal(identity, await shown(identity, "there"))
    assert "of a pod on the node node-2, and this is node-1" in text
    await identity.close()


async def test_a_token_of_another_pod(api: FakeTokenApi, identity: Identity) -> None:
    token = api.admit("good", "shop", pod_uid="1a-2b")
    for groups in (None, ("pod1a-2b",), ("pod1a_2b",)):
        assert identity.domain(await shown(identity, token, Caller(groups=groups)), "") == "shop"
    stolen = await shown(identity, token, Caller(groups=("pod3c-4d",)))
    error, text = refusal(identity, stolen)
    assert (error, "the token is another pod's" in text) == (errno.EACCES, True)


async def test_trust_groups(api: FakeTokenApi, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('[[allow]]\ndomains = ["both"]\nnamespaces = ["one", "two"]\n')
    identity = make_identity(settings(api, identity_policy_file=policy))
    for namespace in ("one", "two"):
        caller = await shown(identity, api.admit(namespace, namespace))
        assert identity.domain(caller, "") == "both"
    assert identity.domain(await shown(identity, api.admit("three", "three")), "") == "three"
    await identity.close()


async def test_there_must_be_an_api_server(
    api: FakeTokenApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="set token_api to the API server's"):
        make_identity(settings(api, token_api=""))
    with pytest.raises(ConfigError, match=r"token_api_ca_file .* will not do"):
        make_identity(settings(api, token_api_ca_file=tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot read token_api_token_file"):
        make_identity(settings(api, token_api_token_file=tmp_path / "none"))
