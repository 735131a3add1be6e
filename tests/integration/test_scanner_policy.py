"""The scanner's policy, changed while it runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from fakes.fake_agent import FakeAgent, random_pages
from helpers.scanner_host import ScannerHost
from helpers.waiting import until

from samepage.v1 import scanner_pb2


@pytest.fixture
async def host() -> AsyncIterator[ScannerHost]:
    async with ScannerHost() as host:
        yield host


async def change(host: ScannerHost, **values: Any) -> scanner_pb2.ScannerPolicy:
    policy = scanner_pb2.ScannerPolicy(**values)
    answer = await host.api.SetPolicy(scanner_pb2.SetScannerPolicyRequest(policy=policy))
    return answer.policy


async def read(host: ScannerHost) -> scanner_pb2.ScannerPolicy:
    return (await host.api.GetPolicy(scanner_pb2.GetScannerPolicyRequest())).policy


async def test_policy_is_the_configuration_at_first(host: ScannerHost) -> None:
    policy = await read(host)
    for field in policy.DESCRIPTOR.fields:
        assert policy.HasField(field.name)  # type: ignore[arg-type]  # a name that is one
        assert getattr(policy, field.name) == getattr(host.config, field.name)


async def test_change_sets_what_is_present_alone(host: ScannerHost) -> None:
    before = await read(host)
    after = await change(host, cpu_percent=3.5)
    assert after.cpu_percent == 3.5
    after.cpu_percent = before.cpu_percent
    assert after == before
    assert await change(host) == await read(host)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("interval_seconds", 0.0),
        ("interval_seconds", float("nan")),
        ("interval_max_seconds", 1e9),
        ("recheck_seconds", 0.5),
        ("rest_passes_max", 256),
        ("min_run_pages", 0),
        ("sampling_bits", 17),
        ("cpu_percent", 0.0),
        ("cpu_percent", 101.0),
    ],
)
async def test_bad_value_changes_nothing_and_is_told(
    host: ScannerHost, name: str, value: float
) -> None:
    before = await read(host)
    good = "cpu_percent" if name != "cpu_percent" else "interval_seconds"
    with pytest.raises(grpc.aio.AioRpcError, match=f"{name} must be") as error:
        await change(host, **{name: value, good: 50.0})
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await read(host) == before


async def test_shorter_interval_is_in_force_at_once(host: ScannerHost) -> None:
    agent = await FakeAgent.connect(host.directory)
    await agent.open("a", random_pages(1, 1))
    await host.service.passes.run_once()
    passes = host.service.passes.passes
    await change(host, interval_seconds=0.01, interval_max_seconds=0.01)
    await until(lambda: host.service.passes.passes > passes + 2)
    agent.close()
