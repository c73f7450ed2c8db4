"""Read and print lengths (4096, 4k, 1m) and durations (90s, 10m, 1.5h)."""

from __future__ import annotations

import re

from mla.bench.workload.scenario import MAX_COUNT

UNITS = {"": 1, "k": 2**10, "m": 2**20}


def size(text: str) -> int:
    """Return 4096 for "4k". Raises ValueError unless `text` is a length from 0 to `MAX_COUNT`."""
    found = re.fullmatch(r"([0-9]{1,10})([km]?)", text.strip().lower())
    value = int(found[1]) * UNITS[found[2]] if found else -1
    if not 0 <= value <= MAX_COUNT:
        raise ValueError(f"'{text}' is not a valid length: use a number such as 4096, 4k or 1m.")
    return value


_BYTES = {
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}


def memory(text: str) -> int:
    """Return the bytes of "80GiB" or "64 GB". Raises ValueError for anything else, and for 0."""
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?) ?([kmgt]i?b)", text.strip().lower())
    value = int(float(found[1]) * _BYTES[found[2]]) if found else 0
    if value < 1:
        raise ValueError(f"'{text}' is not a valid amount of memory, such as 80GiB or 64GB")
    return value


LONGEST = 1e9  # seconds, 31 years: no clock of Python waits for much longer
TIME_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def duration(text: str) -> float:
    """Return the seconds of "90", "90s", "10m" or "1.5h". Raises ValueError for anything else, and for 0."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    seconds = float(found[1]) * TIME_UNITS[found[2]] if found else 0.0
    if not 0 < seconds <= LONGEST:
        raise ValueError(f"'{text}' is not a valid duration, such as 90s, 10m or 1.5h")
    return seconds


def spoken(seconds: float) -> str:
    """Return a duration in the unit a reader would choose."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 1 or not seconds else f"{seconds:.1g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
