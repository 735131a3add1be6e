"""Alerts and panels ask for metrics that exist, and every alert is explained."""

from __future__ import annotations

import json
import re

import promql_parser
import pytest
import yaml
from helpers.chart import CHART, ROOT, named

_METRIC = re.compile(r"\b(?:samepage|process)_\w+")


def documented() -> set[str]:
    """The metrics of docs/metrics.md, with what histograms add."""
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    return {name + suffix for name in rows for suffix in ("", "_bucket", "_count")}


def alerts() -> list[dict[str, str]]:
    rules: list[dict[str, str]] = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())[
        "groups"
    ][0]["rules"]
    return rules


def asked() -> list[str]:
    """What alerts and panels ask Prometheus."""
    panels = json.loads((CHART / "files" / "dashboard.json").read_text())["panels"]
    of_panels = [target["expr"] for panel in panels for target in panel["targets"]]
    return [rule["expr"] for rule in alerts()] + of_panels


@pytest.mark.parametrize("query", asked())
def test_prometheus_understands(query: str) -> None:
    """What the parser, which checks functions and types as well, does not raise ValueError at."""
    promql_parser.parse(query.replace("$__rate_interval", "5m"))


def test_metrics_exist() -> None:
    names = {name for text in asked() for name in _METRIC.findall(text)}
    assert len(names) > 10
    assert names <= documented()


def test_every_alert_is_explained() -> None:
    explained = re.findall(
        r"^### (Samepage\w+)$", (ROOT / "docs" / "operations.md").read_text(), re.M
    )
    assert explained == [rule["alert"] for rule in alerts()]


@pytest.mark.needs("chart_tools")
def test_they_are_rendered_whole() -> None:
    rule = next(each for each in [named("recommended", "ConfigMap", "dashboard")])
    assert json.loads(rule["data"]["samepage.json"])["uid"] == "samepage"
