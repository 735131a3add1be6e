"""The metrics of real services, and that docs/metrics.md names exactly these."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from application import PAGE, Application
from helpers.scrape import Scrape, scrape
from helpers.up import Up, running, wait_until_gone
from helpers.waiting import until

import samepage

pytestmark = pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap")

PAGES = 600
SERVICES = ("merger", "scanner", "arenas", "index")
DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with running(tmp_path_factory.mktemp("metrics")) as up:
        yield up


def metrics_of(cluster: Up, service: str) -> Scrape:
    [host] = cluster.cluster.hosts
    address = host.metrics[service] if service != "index" else cluster.cluster.index_metrics
    return scrape(address)


def documented() -> dict[str, set[str]]:
    """The names in the tables of docs/metrics.md, by the service whose section they are in."""
    found: dict[str, set[str]] = {}
    section = ""
    for line in DOCUMENT.read_text().splitlines():
        if heading := re.match(r"## (?:The )?(\w+)", line):
            section = heading[1].lower()
        elif row := re.match(r"\| `(\w+)`", line):
            found.setdefault(section, set()).add(row[1])
    return found


def test_the_addresses_are_in_the_cluster_file(cluster: Up) -> None:
    content = json.loads((cluster.directory / "cluster.json").read_text())
    addresses = [content["index_metrics"], *content["hosts"][0]["metrics"].values()]
    assert len(set(addresses)) == len(SERVICES)
    assert all(address.startswith("127.0.0.1:") for address in addresses)
    ready = json.loads((cluster.host() / "merger.ready").read_text())
    assert ready["metrics"] == content["hosts"][0]["metrics"]["merger"]
    assert list(content["hosts"][0]["metrics"]) == ["merger", "scanner", "arenas"]


@pytest.mark.parametrize("service", SERVICES)
def test_the_document_names_what_is_served(cluster: Up, service: str) -> None:
    names = documented()
    served = metrics_of(cluster, service).names()
    identity = names["identity"] if service in ("merger", "scanner") else set()
    assert served == names[service] | names["all"] | identity


@pytest.mark.parametrize("service", SERVICES)
def test_help_ends_with_a_stop_and_every_family_has_it(cluster: Up, service: str) -> None:
    for family in metrics_of(cluster, service).families.values():
        assert family.documentation, family.name
        if family.name.startswith("samepage_"):
            assert family.documentation.endswith("."), family.name


@pytest.mark.parametrize("service", SERVICES)
def test_services_say_who_they_are(cluster: Up, service: str) -> None:
    found = metrics_of(cluster, service)
    assert found.labels("samepage_build_info", "service") == {service}
    assert found.value("samepage_serving") == 1
    assert found.value("process_cpu_seconds_total") > 0


def test_sharing_shows(cluster: Up) -> None:
    host = cluster.host()
    before = metrics_of(cluster, "merger"), metrics_of(cluster, "scanner")
    with Application(host) as one, Application(host) as two:
        for application, name in ((one, "a"), (two, "b")):
            application.call("create", name, PAGES, "metered")
            application.call("fill", name, 1)
        two.call("share", "b")
        one.call("write", "a", 0, "beef")
        with samepage.connect(host) as node:
            told = node.stats()
        merger, scanner = metrics_of(cluster, "merger"), metrics_of(cluster, "scanner")
        saved = merger.value("samepage_merger_saved_bytes", domain="metered")
        assert saved == told.saved_bytes > 0.9 * PAGES * PAGE
        shared = merger.value("samepage_merger_shared_pages", domain="metered")
        assert shared == told.shared_pages
        assert merger.value("samepage_merger_store_bytes", domain="metered") == told.store_bytes
        assert merger.value("samepage_merger_agents") == 3
        assert merger.value("samepage_merger_arenas", state="open") == 2

        def grown(number: int, now: Scrape, sample: str, **labels: str) -> float:
            return now.value(sample, **labels) - before[number].value(sample, **labels)

        replaced = grown(0, merger, "samepage_merger_replaced_pages_total")
        assert replaced == 2 * PAGES
        outcomes = "samepage_merger_page_outcomes_total"
        assert grown(0, merger, outcomes, outcome="merged") == 2 * PAGES
        assert grown(0, merger, outcomes, outcome="pinned") == 0
        assert grown(0, merger, "samepage_merger_restored_pages_total") >= 1
        assert grown(0, merger, "samepage_merger_candidate_pages_total") >= PAGES
        assert grown(1, scanner, "samepage_scanner_candidate_pages_total") >= PAGES
        assert grown(1, scanner, "samepage_scanner_scanned_pages_total") >= 2 * PAGES
        assert grown(1, scanner, "samepage_scanner_shares_total") == 1
        assert grown(1, scanner, "samepage_scanner_pass_seconds_count", kind="share") == 1
        assert scanner.value("samepage_scanner_arenas") == 2
        assert scanner.value("samepage_scanner_pages") == 2 * PAGES
        assert scanner.value("samepage_scanner_connected", to="merger") == 1
        assert scanner.value("samepage_scanner_background_cpu_limit_cores") == 0.1


async def test_a_merger_that_died_comes_back_with_its_metrics(cluster: Up) -> None:
    host = cluster.host()
    scanner = metrics_of(cluster, "scanner")
    with Application(host) as one:
        one.call("create", "lasting", PAGES, "metered")
        pid = cluster.daemons()["host-1/merger"]
        os.kill(pid, signal.SIGKILL)
        wait_until_gone([pid])
        cluster.wait_for("message", "host-1/merger serves again")

        def value(service: str, sample: str, **labels: str) -> float:
            return metrics_of(cluster, service).value(sample, **labels)

        await until(lambda: value("merger", "samepage_merger_agent_reconnects_total") == 1)
        await until(lambda: value("merger", "samepage_merger_arenas", state="open") == 1)
        sample = "samepage_scanner_connections_total"
        before = scanner.value(sample, to="merger")
        await until(lambda: value("scanner", sample, to="merger") == before + 1)
