"""Every finding of a security linter, with all hardening on, has its explanation here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.chart import template

pytestmark = pytest.mark.needs("chart_tools", "checkov")

_TESTS = r"Pod\.samepage\.samepage-test-\w+"
_ANY = r".*"
_ROOT = r"DaemonSet\.samepage\.samepage-(agent|device-plugin)"

#: (check, what it may be found in): why it is so.
EXPLAINED = {
    ("CKV_K8S_11", _ANY): "a limit on CPU stalls threads that wait for a page; requests are set",
    ("CKV_K8S_13", r"DaemonSet\.samepage\.samepage-agent"): (
        "the store is charged to the merger, and a limit would kill it: store_limit_bytes is one"
    ),
    ("CKV_K8S_15", _ANY): "image.pullPolicy is the user's; tags are never moved",
    ("CKV_K8S_43", _ANY): "digests are the user's: only who builds or copies the images has them",
    (
        "CKV_K8S_23",
        _ROOT,
    ): "the owner of /dev/userfaultfd and of the node's directories; no capability",
    ("CKV_K8S_40", _ROOT): "likewise",
    ("CKV_K8S_8", _TESTS): "a pod that runs once and ends",
    ("CKV_K8S_9", _TESTS): "likewise",
    ("CKV2_K8S_6", _TESTS): "nothing listens in it, and it lives for seconds",
}


def explanation(check: str, resource: str) -> tuple[str, str] | None:
    """The entry that a finding falls under."""
    return next(
        (key for key in EXPLAINED if key[0] == check and re.fullmatch(key[1], resource)), None
    )


def test_every_finding_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "recommended.yaml"
    path.write_text(template("recommended"))
    checkov = Path(sys.prefix) / "checkov" / "bin" / "checkov"
    done = subprocess.run(
        [checkov, "--file", path, "--framework", "kubernetes", "--output", "json", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 0
    assert report["summary"]["parsing_errors"] == 0
    found = {(each["check_id"], each["resource"]) for each in report["results"]["failed_checks"]}
    unexplained = sorted(each for each in found if explanation(*each) is None)
    assert not unexplained
    assert {explanation(*each) for each in found} == set(EXPLAINED)
