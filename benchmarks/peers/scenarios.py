"""The scenarios of a peer run: the two standard ones, and decoding after long histories."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from mla.bench.workload.grid import Point, points_of
from mla.bench.workload.scenario import Scenario
from mla.bench.workload.workload_file import load_workload
from mla.errors import UsageError

REQUESTS = 16
# Steps of a pass by history length: a pass takes a few seconds, and the oracle minutes at most.
STEPS = ((8192, 50), (32768, 20), (1 << 31, 10))


def scenarios(words: Sequence[str], **counts: int | None) -> list[Point]:
    """Return the scenarios named "prefill", "decode" or "long:16k"; `counts` replace runs, passes, warmups.

    Raises `UsageError`.
    """
    given = {name: count for name, count in counts.items() if count is not None}
    return points_of([msgspec.structs.replace(scenario(word), **given) for word in dict.fromkeys(words)], {})


def scenario(word: str) -> Scenario:
    """Return one scenario by its command-line name. Raises `UsageError`."""
    standard = {one.name: one for one in load_workload("standard")}
    if word in standard:
        return standard[word]
    match = re.fullmatch(r"long:(\d+)(k?)", word)
    if match is None or not 0 < (history := int(match[1]) * (1024 if match[2] else 1)) < 1 << 24:
        raise UsageError(f"unknown scenario '{word}': use {', '.join(standard)} or long:TOKENS (long:16k).")
    return long_context(history)


def long_context(history: int) -> Scenario:
    """Return decoding of 16 requests after `history` tokens each."""
    steps = next(steps for limit, steps in STEPS if history < limit)
    return Scenario(
        name=f"long-{history}",
        mode="decode",
        query_lens=(1,) * REQUESTS,
        history=(history,) * REQUESTS,
        runs=steps,
        warmups=2,
    )


def is_long(scenario: Scenario) -> bool:
    """Return whether the histories are too long for implementations that expand them in every step."""
    return scenario.name.startswith("long-")
