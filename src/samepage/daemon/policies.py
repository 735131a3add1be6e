"""Settings that may change while a daemon runs: those that its policy message has.

A policy message has an `optional` field for each of them, of the setting's name. The config class
checks a change as it checks a file, so that there is one validation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

import structlog
from google.protobuf.message import Message

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Config = TypeVar("Config", bound=DataclassInstance)
else:
    Config = TypeVar("Config")

Policy = TypeVar("Policy", bound=Message)

log = structlog.get_logger(__name__)


class Policies(Generic[Config]):
    """A daemon's settings, as they are now.

    Attributes:
        current: read it anew each time it is needed.
    """

    def __init__(self, config: Config) -> None:
        self.current = config
        self._followers: list[Callable[[], None]] = []

    def follow(self, changed: Callable[[], None]) -> None:
        """Have something called after every change."""
        self._followers.append(changed)

    def change(self, wanted: Message) -> None:
        """Set what is present in a policy message; all of it, or nothing.

        Raises:
            ConfigError: a value is out of its range; the text names the setting and the range.
        """
        changes = {field.name: value for field, value in wanted.ListFields()}
        if not changes:
            return
        self.current = dataclasses.replace(self.current, **changes)
        log.info("policy changed", **changes)
        for changed in self._followers:
            changed()

    def fill(self, policy: Policy) -> Policy:
        """Set every field of a policy message to the setting of that name; returns it."""
        for field in policy.DESCRIPTOR.fields:
            setattr(policy, field.name, getattr(self.current, field.name))
        return policy
