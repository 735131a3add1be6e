"""Policy files: who may use what, what they must look like, and how they change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from samepage.daemon.config import ConfigError
from samepage.daemon.identity import DeniedError, IdentitySettings, Subject
from samepage.daemon.identity.policy import Policy

USERS = """
[[allow]]
domains = ["web", "common"]
uids = [1000, "2000-2999"]

[[allow]]
domains = ["data"]
gids = [50]

[[allow]]
domains = ["*"]
uids = [7]
"""

GROUPS = """
[[allow]]
domains = ["shop"]
namespaces = ["shop-*", "cart"]

[[allow]]
domains = ["robots"]
service_accounts = ["ci/robot"]
uids = [1000]
"""


def user(uid: int, *gids: int) -> Subject:
    return Subject(uid, frozenset(gids))


def pod(namespace: str, account: str = "default", uid: int = 1000) -> Subject:
    return Subject(uid, frozenset(), namespace, account)


@pytest.fixture
def users(tmp_path: Path) -> Policy:
    path = tmp_path / "policy.toml"
    path.write_text(USERS)
    return Policy(path, tokens=False)


@pytest.fixture
def groups(tmp_path: Path) -> Policy:
    path = tmp_path / "policy.toml"
    path.write_text(GROUPS)
    return Policy(path, tokens=True)


@pytest.mark.parametrize(
    ("subject", "allowed"),
    [
        (user(1000), ["web", "common"]),
        (user(2500), ["web", "common"]),
        (user(3000), []),
        (user(3000, 10, 50), ["data"]),
        (user(1000, 50), ["web", "common", "data"]),
        (user(0), []),
    ],
)
def test_users_and_groups(users: Policy, subject: Subject, allowed: list[str]) -> None:
    assert users.allowed(subject) == allowed


def test_the_first_domain_is_ones_own(users: Policy) -> None:
    assert users.choose(user(1000, 50), "") == "web"
    assert users.choose(user(1000, 50), "data") == "data"
    with pytest.raises(DeniedError, match="uid 2000 may not use the domain 'data', only web, comm"):
        users.choose(user(2000), "data")
    with pytest.raises(DeniedError, match="uid 0 may use no domain of this host"):
        users.choose(user(0), "")


def test_a_star_is_any_domain(users: Policy) -> None:
    assert users.choose(user(7), "") == "default"
    assert users.choose(user(7), "anything") == "anything"


def test_namespaces_have_domains_of_their_own_but_for_trust_groups(groups: Policy) -> None:
    assert groups.choose(pod("blog"), "") == "blog"
    assert groups.choose(pod("cart"), "") == groups.choose(pod("shop-eu"), "") == "shop"
    with pytest.raises(DeniedError, match=r"account blog/default .* may not use the domain 'shop'"):
        groups.choose(pod("blog"), "shop")
    with pytest.raises(DeniedError, match="only shop"):
        groups.choose(pod("cart"), "cart")


def test_a_namespace_does_not_get_into_a_group_by_its_name(groups: Policy) -> None:
    """Nobody named the namespace "shop" when the group "shop" was made."""
    assert groups.allowed(pod("shop")) == []


def test_all_conditions_of_a_rule_must_hold(groups: Policy) -> None:
    assert groups.allowed(pod("ci", "robot")) == ["robots"]
    assert groups.allowed(pod("ci", "robot", uid=0)) == ["ci"]
    assert groups.allowed(pod("ci", "other")) == ["ci"]


def test_without_a_file_each_namespace_has_its_domain() -> None:
    assert Policy(None, tokens=True).allowed(pod("blog")) == ["blog"]


def test_a_file_that_changes(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(USERS)
    policy = Policy(path, tokens=False)
    path.write_text('[[allow]]\ndomains = ["other"]\nuids = [1000]\n')
    assert policy.choose(user(1000), "") == "other"
    for broken in ("[[allow]\n", '[[allow]]\ndomains = ["x"]\n'):
        path.write_text(broken)
        assert policy.choose(user(1000), "") == "other"
    path.unlink()
    assert policy.choose(user(1000), "") == "other"
    path.write_text(USERS)
    assert policy.choose(user(1000), "") == "web"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("x", "is not valid TOML"),
        ("allow = 3", r"must hold tables \[\[allow\]\] and nothing else"),
        ("other = 3", r"must hold tables \[\[allow\]\] and nothing else"),
        ("[[allow]]\nuids = [1]", "say domains, and for whom"),
        ('[[allow]]\ndomains = ["a"]', "say domains, and for whom"),
        ('[[allow]]\ndomains = ["A"]\nuids = [1]', "the domain 'A' is not valid"),
        ("[[allow]]\ndomains = []\nuids = [1]", "domains must be a list that is not empty"),
        ('[[allow]]\ndomains = ["a"]\nuids = []', "uids must be a list that is not empty"),
        ('[[allow]]\ndomains = ["a"]\nuids = ["9-1"]', "neither a number nor a range"),
        ('[[allow]]\ndomains = ["a"]\nuids = ["x"]', "neither a number nor a range"),
        ('[[allow]]\ndomains = ["a"]\nuids = [1.5]', "neither a number nor a range"),
        ('[[allow]]\ndomains = ["a"]\ngids = [4294967296]', "neither a number nor a range"),
        ('[[allow]]\ndomains = ["a"]\nusers = [1]', "there is no users; there are domains, uids"),
        ('[[allow]]\ndomains = ["a"]\nnamespaces = ["a"]', 'known by identity "token"'),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=error):
        Policy(path, tokens=False)


def test_service_accounts_have_namespaces(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('[[allow]]\ndomains = ["a"]\nservice_accounts = ["robot"]')
    with pytest.raises(ConfigError, match="'robot' must be namespace/name"):
        Policy(path, tokens=True)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the policy .*: No such file"):
        Policy(tmp_path / "none", tokens=True)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"identity": "name"}, "identity must be one of socket, uid, token"),
        ({"identity": "uid"}, "identity_policy_file must say who may use which domains"),
        ({"identity_policy_file": Path("x")}, "identity_policy_file is set but identity is socket"),
        ({"token_audience": ""}, "token_audience must not be empty"),
        ({"token_api": "http://127.0.0.1:1"}, "token_api must begin with https://"),
        ({"token_cache_seconds": 601.0}, "token_cache_seconds must be 0 to 600"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        IdentitySettings(**settings).check_identity()
