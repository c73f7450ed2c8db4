"""Lengths as people write them: 4096, 4k, 1m."""

from __future__ import annotations

import re

from mla.bench.workload.scenario import MAX_COUNT

UNITS = {"": 1, "k": 2**10, "m": 2**20}


def size(text: str) -> int:
    """Return 4096 for "4k". Raises ValueError for what is no length from 0 to `MAX_COUNT`."""
    found = re.fullmatch(r"([0-9]{1,10})([km]?)", text.strip().lower())
    value = int(found[1]) * UNITS[found[2]] if found else -1
    if not 0 <= value <= MAX_COUNT:
        raise ValueError(f"'{text}' is no length: use a number such as 4096, 4k or 1m.")
    return value
