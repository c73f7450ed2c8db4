"""The file that `compare.py` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from mla.bench.results import stats
from mla.bench.results.schema import BackendFacts, Interval
from mla.errors import ResultError

SCHEMA_VERSION = 1
# A relative error that bf16 and f16 operands do not explain; right results have 0.002 to 0.007.
WRONG = 0.02
NO_RESULT = 1e9  # the error of one with NaN or infinities, which JSON has no numbers for


class Timing(msgspec.Struct, kw_only=True):
    """One way of computing a case. `visits_ms`: the median of every visit, by round."""

    name: str
    party: Literal["ours", "reference", "torch", "peer"]  # "torch": in files of before
    dtype: str
    ms: float  # the median of the visits
    ci95: Interval | None  # of that median; None with fewer than 6 rounds
    visits_ms: list[float]
    calls: int  # timed, of a visit
    error: float  # norm of the difference from float64, over the norm of the result in float64

    @property
    def wrong(self) -> bool:
        """Whether the result is not that of the op."""
        return self.error > WRONG


class Case(msgspec.Struct, kw_only=True):
    """One shape. `passed_over`: ways too slow to be timed in every round, with the ms of their trial."""

    name: str
    op: Literal["attention", "selection", "product"]
    flops: int
    timings: list[Timing]
    passed_over: dict[str, float] = {}

    def of(self, party: str) -> list[Timing]:
        """Return a party's ways with right results, fastest first."""
        return sorted(
            (timing for timing in self.timings if timing.party == party and not timing.wrong),
            key=lambda timing: timing.ms,
        )


class Comparison(msgspec.Struct, kw_only=True):
    """One run of `compare.py`."""

    report: Literal["ggml peer"] = "ggml peer"
    schema_version: int = SCHEMA_VERSION
    argv: list[str]
    created: str  # ISO 8601, UTC
    git_commit: str | None
    backend: BackendFacts
    environment: dict[str, str]
    peer: dict[str, str]  # what was built, from what, and what it says of itself
    threads: int
    seed: int
    cases: list[Case]


def ratio(slow: Timing, fast: Timing) -> tuple[float, Interval | None]:
    """Return how many times as fast `fast` is: the median over rounds, and its interval."""
    pairs = [ms / other for ms, other in zip(slow.visits_ms, fast.visits_ms, strict=True)]
    return stats.median(pairs), stats.median_interval(pairs)


def read(path: Path) -> Comparison:
    """Read a file. Raises `ResultError`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Comparison)
    except OSError as error:
        raise ResultError(f"cannot read '{path}': {error.strerror}.") from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ResultError(f"'{path}' was not written by compare.py: {error}.") from error
