"""Configs: defaults, file, environment, and what a wrong setting is told."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from samepage.daemon.config import ConfigError, load, render, require, sample, setting


@dataclass(frozen=True)
class Example:
    listen: str = setting("127.0.0.1:0", "Address to serve on.")
    workers: int = setting(2, "Worker threads.")
    lease_seconds: float = setting(15.0, "Seconds a lease lasts.")
    reflection: bool = setting(False, "Offer reflection.")
    ready_file: Path | None = setting(None, "Written when serving.")
    redis_url: str = setting('redis://"x"', "Where Redis is.", secret=True)

    def __post_init__(self) -> None:
        require(self.workers > 0, f"workers must be 1 or more, not {self.workers}")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "samepage.toml"


def test_defaults() -> None:
    assert load(Example, "example", None, {}) == Example()


def test_environment_wins_over_file_wins_over_default(file: Path) -> None:
    file.write_text('[example]\nworkers = 3\nlease_seconds = 4\nready_file = "/run/a"\n')
    env = {"SAMEPAGE_EXAMPLE_WORKERS": "5", "SAMEPAGE_EXAMPLE_REFLECTION": "yes"}
    config = load(Example, "example", file, env)
    assert config == Example(
        workers=5, lease_seconds=4.0, reflection=True, ready_file=Path("/run/a")
    )
    assert type(config.lease_seconds) is float


def test_empty_means_none_for_an_optional(file: Path) -> None:
    file.write_text('[example]\nready_file = "/run/a"\n')
    assert load(Example, "example", file, {"SAMEPAGE_EXAMPLE_READY_FILE": ""}).ready_file is None


def test_other_sections_and_service_links_are_ignored(file: Path) -> None:
    file.write_text("[other]\nunknown = 1\n")
    env = {
        "SAMEPAGE_OTHER_UNKNOWN": "1",
        "SAMEPAGE_EXAMPLE_SERVICE_HOST": "10.0.0.1",
        "SAMEPAGE_EXAMPLE_SERVICE_PORT_GRPC": "7070",
        "SAMEPAGE_EXAMPLE_PORT": "tcp://10.0.0.1:7070",
        "SAMEPAGE_EXAMPLE_PORT_7070_TCP_ADDR": "10.0.0.1",
    }
    assert load(Example, "example", file, env) == Example()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[example]\nworker = 3", "worker: there is no such setting; there are listen, workers"),
        ("[example]\nworkers = 1.5", "workers: 1.5 is not a whole number"),
        ("[example]\nworkers = true", "workers: True is not a whole number"),
        ("[example]\nreflection = 1", "reflection: 1 is not true or false"),
        ("[example]\nlisten = 1", "listen: 1 is not a string"),
        ("[example]\nready_file = 1", "ready_file: 1 is not a path"),
        ("[example]\nworkers = 0", r"\[example\] workers must be 1 or more, not 0"),
        ("example = 1", "example must be a table"),
        ("[example", "not valid TOML"),
    ],
)
def test_wrong_file(file: Path, text: str, told: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=told):
        load(Example, "example", file, {})


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("NOPE", "1", "SAMEPAGE_EXAMPLE_NOPE: there is no such setting"),
        ("WORKERS", "two", "SAMEPAGE_EXAMPLE_WORKERS: 'two' is not a whole number"),
        ("LEASE_SECONDS", "", "'' is not a number"),
        ("REFLECTION", "maybe", "'maybe' is not true or false"),
    ],
)
def test_wrong_environment(name: str, value: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load(Example, "example", None, {f"SAMEPAGE_EXAMPLE_{name}": value})


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config file .*No such file"):
        load(Example, "example", tmp_path / "none.toml", {})


def test_sample_holds_every_default_and_is_valid_when_uncommented(file: Path) -> None:
    text = sample(Example, "example")
    assert tomllib.loads(text) == {"example": {}}
    lines = [
        line[1:] if line.startswith("#") and line[1] != " " else line
        for line in text.split("\n")
        if line
    ]
    file.write_text("\n".join(lines))
    assert set(tomllib.loads(file.read_text())["example"]) == set(Example.__dataclass_fields__)
    assert load(Example, "example", file, {}) == Example()


def test_render_hides_secrets(file: Path) -> None:
    text = render(Example(workers=7, redis_url="redis://:secret@h"), "example")
    assert "secret" not in text
    assert tomllib.loads(text)["example"]["workers"] == 7
