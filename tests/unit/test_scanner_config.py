"""The scanner's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from samepage.daemon.config import ConfigError, load, sample
from samepage_scanner.config import SECTION, Config


def test_defaults_hold_together() -> None:
    config = load(Config, SECTION, None, {})
    assert config.node_name
    assert config.merger_target == "unix:/run/samepage/merger-api.sock"
    assert config.addresses == ("127.0.0.1:0", "unix:/run/samepage/scanner-api.sock")
    assert not config.index


def test_sample_names_every_setting(tmp_path: Path) -> None:
    path = tmp_path / "scanner.toml"
    path.write_text(sample(Config, SECTION))
    assert load(Config, SECTION, path, {}) == Config()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("node", "a/b"),
        ("node", "a" * 254),
        ("listen", "nowhere"),
        ("interval_seconds", 0.0),
        ("interval_seconds", -1.0),
        ("interval_seconds", 1e9),
        ("interval_max_seconds", 9.0),
        ("interval_max_seconds", 1e9),
        ("answer_seconds", 0.0),
        ("merger_seconds", 0.0),
        ("recheck_seconds", 0.0),
        ("rest_passes_max", 256),
        ("min_run_pages", 0),
        ("sampling_bits", 17),
        ("cpu_percent", 0.0),
        ("cpu_percent", 100.5),
        ("pages_max", 0),
        ("pages_max", 1 << 33),
        ("drain_seconds", -1.0),
        ("log_level", "loud"),
    ],
)
def test_bad_settings_say_which(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=setting):
        Config(**{setting: value})
