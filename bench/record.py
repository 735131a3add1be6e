"""What a benchmark says: one JSON line a figure, the peer's value beside ours."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Record:
    """One figure.

    Attributes:
        bench: the module that measured it.
        what: what was measured.
        unit: of `peer` and `ours`.
        peer: median of the peer's runs; None where there is no peer to run.
        ours: median of this project's runs.
        peer_name: what the peer is.
        runs: how many of each, alternating.
    """

    bench: str
    what: str
    unit: str
    peer: float | None
    ours: float
    peer_name: str
    runs: int

    @property
    def ratio(self) -> float | None:
        """Ours / peer."""
        return None if self.peer is None else self.ours / self.peer

    def line(self) -> str:
        """Return the JSON line."""
        return json.dumps({**dataclasses.asdict(self), "ratio": self.ratio})


def median(values: Sequence[float]) -> float | None:
    """The median, None of nothing."""
    return statistics.median(values) if values else None
