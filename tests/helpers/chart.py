"""Renders the Helm chart, and finds what is in it."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "samepage"
#: Documented combinations of values, by name.
CASES = {
    path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*.yaml"))
}
TOOLS = Path(sys.prefix) / "go" / "bin"

Manifest = dict[str, Any]


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run helm or kustomize as `make` built them."""
    return subprocess.run(
        [TOOLS / name, *arguments], capture_output=True, text=True, check=False, timeout=60
    )


@functools.cache
def template(case: str, *options: str) -> str:
    """What the chart gives for a case of `CASES`.

    Raises:
        AssertionError: helm refuses.
    """
    done = tool(
        "helm", "template", "samepage", CHART, "-n", "samepage", "-f", CASES[case], *options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def objects(case: str, *options: str) -> tuple[Manifest, ...]:
    """The objects of a case."""
    return tuple(each for each in yaml.safe_load_all(template(case, *options)) if each)


def named(case: str, kind: str, name: str) -> Manifest:
    """One object."""
    (found,) = (
        each
        for each in objects(case)
        if each["kind"] == kind and each["metadata"]["name"] == f"samepage-{name}"
    )
    return found


def pods(manifests: tuple[Manifest, ...]) -> Iterator[tuple[str, Manifest]]:
    """The name and the spec of each kind of pod."""
    for each in manifests:
        spec = each.get("spec", {})
        if each["kind"] == "Pod":
            yield each["metadata"]["name"], spec
        elif "template" in spec:
            yield each["metadata"]["name"], spec["template"]["spec"]
