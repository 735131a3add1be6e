"""What is derived from the cluster's secret, and which names are valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from samepage.daemon.config import ConfigError
from samepage.daemon.secrets import check_domain, check_name, domain_id, domain_seed, read_secret
from samepage.errors import InvalidArgumentError

SECRET = b"0123456789abcdef"


def test_derived_values_are_stable() -> None:
    # Other hosts of a cluster may run another release: these values may never change.
    assert domain_seed(SECRET, "default") == 0x715EDADE07192F3D
    assert domain_id(SECRET, "default").hex() == "992dc15257e59582c3eaf8d1600697cd"


def test_derived_values_differ_by_secret_and_domain() -> None:
    secrets = (SECRET, SECRET[::-1], SECRET * 10)
    domains = ("default", "a", "b")
    assert len({domain_seed(s, d) for s in secrets for d in domains}) == 9
    ids = {domain_id(s, d) for s in secrets for d in domains}
    assert len(ids) == 9
    assert {len(i) for i in ids} == {16}


def test_read_secret_drops_line_ends_only(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(b" " + SECRET + b" \r\n")
    assert read_secret(file) == b" " + SECRET + b" "


def test_read_secret_too_short(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(SECRET[:-1] + b"\n")
    with pytest.raises(ConfigError, match="15 bytes and needs 16 or more: make one with"):
        read_secret(file)


def test_read_secret_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the secret file .*No such file"):
        read_secret(tmp_path / "none")


@pytest.mark.parametrize("domain", ["a", "0", "default", "team-a.prod", "a--b..c", "x" * 63])
def test_valid_domains(domain: str) -> None:
    assert check_domain(domain) == domain


@pytest.mark.parametrize(
    "domain", ["", "-a", "a-", ".a", "a.", "A", "a_b", "a/b", "a\n", "é", "x" * 64, "a" * 10**6]
)
def test_invalid_domains(domain: str) -> None:
    with pytest.raises(InvalidArgumentError, match="is not valid: use 1 to 63"):
        check_domain(domain)
    with pytest.raises(InvalidArgumentError):
        domain_id(SECRET, domain)


@pytest.mark.parametrize("name", ["a", " ", "Embeddings 1.bin", "é" * 63, "x" * 127, "数据"])
def test_valid_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "x" * 128, "é" * 64, "a/b", "a\nb", "\x00", "\x7f", "\x85", "\udc80"]
)
def test_invalid_names(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="the arena name"):
        check_name(name)
