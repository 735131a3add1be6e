"""Finds pages by their fingerprints in the books, for the merger of the host.

All fingerprints of a domain are looked at, in whatever order they lie, so what is wanted first
goes through a table of bits: of a page that nobody asks for, no more is looked at than one bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from samepage_scanner import fingerprints as fp
from samepage_scanner.pages import HAS_FINGERPRINT, Pages

#: One place: number of the fingerprint, number of the arena, page.
PLACE = np.dtype([("fingerprint", "<u4"), ("arena", "<u4"), ("page", "<u8")])

Places = npt.NDArray[np.void]

_FILTER_BITS = 16


def locate(arenas: Sequence[Pages], wanted: fp.Fingerprints) -> Places:
    """Return one place for each wanted fingerprint that some arena has, ascending by fingerprint.

    Books that change meanwhile do no harm: what is where is only ever a hint.
    """
    table = fp.distinct(wanted)
    table_keys = fp.keys(table)
    shift = np.uint64(64 - _FILTER_BITS)
    asked = np.zeros(1 << _FILTER_BITS, np.bool_)
    asked[table_keys >> shift] = True
    places = np.zeros(len(table), PLACE)
    found = np.zeros(len(table), np.bool_)
    for number, pages in enumerate(arenas):
        for block in pages.blocks():
            fingerprints = pages.fingerprints[block]
            rows = np.flatnonzero(asked[fp.keys(fingerprints) >> shift])
            rows = rows[HAS_FINGERPRINT[pages.flags[block][rows]]]
            at, same = fp.contains(table, table_keys, fingerprints[rows])
            at, rows = at[same], rows[same]
            places["arena"][at] = number
            places["page"][at] = rows + block.start
            found[at] = True
    at, known = fp.contains(table, table_keys, wanted)
    numbers = np.flatnonzero(known)
    numbers = numbers[found[at[numbers]]]
    result = places[at[numbers]]
    result["fingerprint"] = numbers
    return result
