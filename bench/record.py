"""What a benchmark says: one JSON line a figure, the peer's value beside ours, and the aim."""

from __future__ import annotations

import dataclasses
import json
import operator
import statistics
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Aim:
    """What a figure has to reach.

    Attributes:
        sign: "<=" or ">=".
        value: of the ratio where there is a peer, else of `ours`.
    """

    sign: str
    value: float

    def __str__(self) -> str:
        return f"{self.sign} {self.value:g}"

    def reached(self, figure: float) -> bool:
        """Return whether a figure is good enough."""
        compare = {"<=": operator.le, ">=": operator.ge}[self.sign]
        return bool(compare(figure, self.value))


@dataclasses.dataclass(frozen=True)
class Record:
    """One figure.

    Attributes:
        bench: the module that measured it.
        what: what was measured.
        unit: of `peer` and `ours`.
        peer: median of the peer's runs; None where there is no peer to run.
        ours: median of this project's runs.
        peer_name: what the peer is; empty where there is none.
        runs: how many of each, alternating.
        aim: None where nothing has to be reached.
    """

    bench: str
    what: str
    unit: str
    peer: float | None
    ours: float
    peer_name: str
    runs: int
    aim: Aim | None = None

    @property
    def ratio(self) -> float | None:
        """Ours / peer."""
        return None if self.peer is None else self.ours / self.peer

    @property
    def reached(self) -> bool | None:
        """Whether the aim is reached; None where it cannot be told."""
        figure = self.ratio if self.peer_name else self.ours
        return None if self.aim is None or figure is None else self.aim.reached(figure)

    def line(self) -> str:
        """Return the JSON line."""
        fields = {**dataclasses.asdict(self), "ratio": self.ratio, "reached": self.reached}
        return json.dumps(fields)


def parse(line: str) -> Record:
    """Return the record of a JSON line."""
    fields: dict[str, Any] = json.loads(line)
    for derived in ("ratio", "reached"):
        del fields[derived]
    aim = fields.pop("aim")
    return Record(**fields, aim=None if aim is None else Aim(**aim))


def median(values: Sequence[float]) -> float | None:
    """The median, None of nothing."""
    return statistics.median(values) if values else None


def percentile(values: Sequence[float], part: float) -> float:
    """The value that `part` (0 to 1) of the values do not exceed; at least one value."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]
