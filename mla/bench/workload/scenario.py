"""A scenario: what is measured and its possible lengths; lengths and durations as users type them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Literal, TypeVar

import msgspec

from mla.errors import UsageError
from mla.text import counted

# Longer lists are typos.
MAX_REQUESTS = 65536
# Larger lengths and counts are typos; kernels keep them in int32.
MAX_COUNT = 2**31 - 1

MAX_LAYERS = 1024

Item = TypeVar("Item")
Positive = Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)]
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=MAX_LAYERS)]


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing to measure. A *pass* is a sequence of timed forwards from the same history.

    prefill: `runs` forwards of one batch, spread over `passes`. decode: `passes` passes of `runs` sequential
    steps; each step adds `query_lens` tokens to the cache.
    """

    name: str
    mode: Literal["prefill", "decode"]
    query_lens: tuple[int, ...]
    history: tuple[int, ...]
    runs: Positive = 100
    passes: Positive = 6
    warmups: Count = 10
    heads: Positive | None = None  # overrides the config's: one tensor-parallel rank
    axes: dict[str, int | str | list[int | str]] = {}  # its own grid, see `mla.bench.workload.grid`
    layers: Layers = 1  # each with its own weights, run one after another: cold, as in a model
    batch_spec: str | None = None  # what the lengths were read from, see `mla.bench.workload.grid`

    @property
    def steps(self) -> int:
        """Number of forwards in one pass; in decode, each has its own inputs."""
        return self.runs if self.mode == "decode" else max(1, -(-self.runs // self.passes))

    @property
    def rounds(self) -> int:
        """Number of timed passes; a prefill has no more passes than runs."""
        return self.passes if self.mode == "decode" else min(self.passes, self.runs)

    @property
    def inputs(self) -> int:
        """Number of distinct hidden states: one per decode step, one for prefill."""
        return self.steps if self.mode == "decode" else 1

    def step(self, index: int) -> int:
        """Return the step whose lengths and inputs forward `index` of a pass has: 0 in prefill."""
        return index if self.mode == "decode" else 0

    def forward_name(self, index: int) -> str:
        """Return what forward `index` of a pass is called."""
        return f"{'step' if self.mode == 'decode' else 'forward'} {index}"

    @property
    def tokens(self) -> int:
        """Number of new tokens in one forward."""
        return sum(self.query_lens)

    def kv_lens(self, step: int) -> tuple[int, ...]:
        """Return the number of attended tokens per request at a step."""
        grown = step + 1 if self.mode == "decode" else 1
        return tuple(past + grown * new for past, new in zip(self.history, self.query_lens, strict=True))

    @property
    def final_lens(self) -> tuple[int, ...]:
        """Number of cached tokens per request at the end of a pass."""
        return self.kv_lens(self.inputs - 1)


def repeated(items: Iterable[Item]) -> Item | None:
    """Return the first of the items that come twice; None if none does."""
    return next((item for item, count in Counter(items).items() if count > 1), None)


def check_lengths(where: str, scenario: Scenario) -> None:
    """Raise `UsageError` for impossible request lengths."""
    if len(scenario.query_lens) != len(scenario.history):
        given = counted(len(scenario.query_lens), "request")
        raise UsageError(
            f"{where}: query_lens has {given}, history {len(scenario.history)}: give both as many."
        )
    if not scenario.query_lens:
        raise UsageError(f"{where}: query_lens is empty; a scenario needs at least one request.")
    if min(scenario.query_lens) < 1:
        raise UsageError(f"{where}: query_lens must be positive, got {min(scenario.query_lens)}.")
    if min(scenario.history) < 0:
        raise UsageError(f"{where}: history must not be negative, got {min(scenario.history)}.")
    if max(scenario.final_lens) > MAX_COUNT:
        raise UsageError(f"{where}: no request may grow beyond {MAX_COUNT} tokens: shorten its history.")


# -------------------------------------------------------------------------------- as users type them

UNITS = {"": 1, "k": 2**10, "m": 2**20}


def size(text: str) -> int:
    """Return 4096 for "4k". Raises ValueError unless `text` is a length from 0 to `MAX_COUNT`."""
    match = re.fullmatch(r"([0-9]{1,10})([km]?)", text.strip().lower())
    value = int(match[1]) * UNITS[match[2]] if match else -1
    if not 0 <= value <= MAX_COUNT:
        raise ValueError(f"'{text}' is not a valid length: use a number such as 4096, 4k or 1m.")
    return value


MAX_SECONDS = 1e9  # 31 years: no clock of Python waits for much longer
TIME_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def duration(text: str) -> float:
    """Return the seconds of "90", "90s", "10m" or "1.5h". Raises ValueError for anything else, and for 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    seconds = float(match[1]) * TIME_UNITS[match[2]] if match else 0.0
    if not 0 < seconds <= MAX_SECONDS:
        raise ValueError(f"'{text}' is not a valid duration, such as 90s, 10m or 1.5h")
    return seconds


def spoken(seconds: float) -> str:
    """Return a duration in the unit a reader would choose."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 1 or not seconds else f"{seconds:.1g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
