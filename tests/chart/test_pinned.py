"""What the images are built from names every dependency."""

from __future__ import annotations

import re
import tomllib

from helpers.chart import ROOT


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["services"]
    pinned = (ROOT / "deploy" / "images" / "requirements.txt").read_text()
    names = {name.lower().replace("_", "-") for name in re.findall(r"^(\S+)==", pinned, re.M)}
    assert {re.split(r"[\[><=~]", each)[0].lower() for each in wanted} <= names
