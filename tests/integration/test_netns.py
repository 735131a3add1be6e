"""`samepage up --netns`: hosts with a network between them, which can fail."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import links
from helpers.up import Up, running, samepage, wait_until_gone

from samepage.cli.netns import Network

pytestmark = [pytest.mark.needs("root", "netns"), pytest.mark.timeout(120)]

INDEX, HOST_1, HOST_2 = "index", "host-1", "host-2"
_PING = """
import socket, sys
socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3])).close()
"""


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with running(tmp_path_factory.mktemp("up"), 2, "--netns") as up:
        yield up


@pytest.fixture
def network(up: Up) -> Network:
    return Network(up.directory, [INDEX, HOST_1, HOST_2])


def reaches(network: Network, host: str, address: str, seconds: float = 2.0) -> bool:
    """Whether a process on a host can connect to an address."""
    where, port = address.rsplit(":", 1)
    arguments = [sys.executable, "-c", _PING, where, port, str(seconds)]
    return subprocess.run(network.command(host, *arguments), capture_output=True).returncode == 0


def test_every_host_has_an_address_and_a_namespace_of_its_own(up: Up, network: Network) -> None:
    hosts = up.cluster.hosts
    assert [host.netns for host in hosts] == [network.namespace(HOST_1), network.namespace(HOST_2)]
    addresses = {host.merger.rsplit(":", 1)[0] for host in hosts}
    assert len(addresses) == 2 and all(re.match(r"198\.1[89]\.", each) for each in addresses)
    assert reaches(network, HOST_1, hosts[1].merger)
    status = json.loads(samepage("status", "--json", "--dir", up.directory).stdout)
    assert status["index"]["hosts"] == 2


def test_a_cable_can_be_cut(up: Up, network: Network) -> None:
    merger = up.cluster.hosts[1].merger
    with links.cut(network.link(HOST_2)):
        assert not reaches(network, HOST_1, merger, 0.3)
    assert reaches(network, HOST_1, merger)


def test_two_hosts_can_be_kept_apart(up: Up, network: Network) -> None:
    merger = up.cluster.hosts[1].merger
    with links.apart(network.link(HOST_1), network.link(HOST_2)):
        assert not reaches(network, HOST_1, merger, 0.3)
        assert reaches(network, HOST_1, up.cluster.index)
        assert reaches(network, HOST_2, up.cluster.index)
    assert reaches(network, HOST_1, merger)


def test_a_link_can_be_slow_and_lossy(up: Up, network: Network) -> None:
    merger = up.cluster.hosts[1].merger
    bridge, link, namespace = network.bridge, network.link(HOST_2), network.namespace(HOST_2)
    with links.impaired(bridge, link, namespace, delay_ms=50):
        began = time.monotonic()
        assert reaches(network, HOST_1, merger, 5)
        assert time.monotonic() - began >= 0.1  # there and back
    with links.impaired(bridge, link, namespace, loss=1):
        assert not reaches(network, HOST_1, merger, 0.3)
    with links.impaired(bridge, link, namespace, delay_ms=5, loss=0.05, reorder=0.25):
        assert reaches(network, HOST_1, merger, 10)
    assert reaches(network, HOST_1, merger)


def test_a_killed_cluster_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    up = Up(tmp_path / "up", 1, "--netns")
    network = Network(up.directory, [INDEX, HOST_1])
    daemons = list(up.daemons().values())
    up.process.send_signal(signal.SIGKILL)
    up.process.communicate()
    wait_until_gone(daemons)
    assert network.bridge in links.ip("link")
    with running(tmp_path / "up", 1, "--netns") as again:
        assert reaches(network, HOST_1, again.cluster.index)
    assert network.bridge not in links.ip("link")
    assert network.bridge not in links.ip("netns")
