"""Workloads: scenarios read from TOML and fully validated before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from mla.errors import UsageError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STANDARD = "standard"
# The shipped workloads.
PRESETS = ("smoke", STANDARD, "full")
# Longer lists are typos.
MAX_REQUESTS = 65536
# Larger lengths and counts are typos; kernels keep them in int32.
MAX_COUNT = 2**31 - 1

MAX_LAYERS = 1024

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


class _File(msgspec.Struct, forbid_unknown_fields=True):
    scenario: list[dict[str, Any]]


def load_workload(source: str) -> list[Scenario]:
    """Read a shipped workload by name, or any by path. Raises `UsageError`."""
    text = _read(source)
    try:
        document = msgspec.convert(tomllib.loads(text), _File)
    except msgspec.ValidationError as error:
        raise UsageError(f"workload '{source}': {error}; it needs [[scenario]] tables.") from error
    except (ValueError, RecursionError) as error:  # absurd numbers and nesting do not raise TOMLDecodeError
        raise UsageError(f"workload '{source}' is not valid TOML: {error}.") from error
    scenarios = [_scenario(source, table) for table in document.scenario]
    names = [scenario.name for scenario in scenarios]
    if not names or len(set(names)) != len(names):
        raise UsageError(f"workload '{source}' needs at least one scenario, each with a unique name.")
    return scenarios


def _read(source: str) -> str:
    shipped = resources.files("mla.bench.workload") / f"{source}.toml"
    try:
        return shipped.read_text() if shipped.is_file() else Path(source).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read workload '{source}': {reason}.") from error


def _scenario(source: str, table: dict[str, Any]) -> Scenario:
    name = table.get("name", "?")
    _check_keys(f"workload '{source}', scenario '{name}'", table)
    try:
        lists: dict[str, Any] = {
            key: parse_lengths(table[key]) for key in ("query_lens", "history") if key in table
        }
        scenario = msgspec.convert({**table, **lists}, Scenario)
    except (msgspec.ValidationError, ValueError) as error:
        raise UsageError(f"workload '{source}', scenario '{name}': {error}.") from error
    check_lengths(f"workload '{source}', scenario '{scenario.name}'", scenario)
    if not scenario.name.strip() or not scenario.name.isprintable():
        raise UsageError(f"workload '{source}': {scenario.name!r} is not a valid name: use one line of text.")
    return scenario


def _check_keys(where: str, table: Mapping[str, Any]) -> None:
    """Raise `UsageError` for unknown and for missing keys."""
    fields = msgspec.structs.fields(Scenario)
    known = [field.encode_name for field in fields]
    for key in table:
        if key not in known:
            hint = did_you_mean(key, known)
            raise UsageError(f"{where}: unknown key '{key}'.{hint} Choose from: {', '.join(known)}.")
    missing = [field.encode_name for field in fields if field.required and field.encode_name not in table]
    if missing:
        raise UsageError(f"{where}: it has no {' and no '.join(missing)}.")


def parse_lengths(items: Any) -> tuple[int, ...]:
    """Expand [64, "50*4"] to 64, 50, 50, 50, 50. Raises ValueError."""
    lengths: list[int] = []
    for item in items if isinstance(items, list) else [items]:
        length, count = _item(item)
        if count < 1 or len(lengths) + count > MAX_REQUESTS:
            raise ValueError(f"{item!r} must repeat between 1 and {MAX_REQUESTS} times")
        lengths += [length] * count
    return tuple(lengths)


def _item(item: Any) -> tuple[int, int]:
    if isinstance(item, int) and not isinstance(item, bool):
        return item, 1
    length, star, count = item.partition("*") if isinstance(item, str) else ("", "", "")
    try:
        return int(length), int(count) if star else 1
    except ValueError:
        raise ValueError(f'{item!r} is neither a length nor "length*count"') from None


def check_lengths(where: str, scenario: Scenario) -> None:
    """Raise `UsageError` for impossible request lengths."""
    if len(scenario.query_lens) != len(scenario.history):
        raise UsageError(
            f"{where}: query_lens has {len(scenario.query_lens)} requests, history {len(scenario.history)}."
        )
    if not scenario.query_lens:
        raise UsageError(f"{where}: query_lens is empty; a scenario needs at least one request.")
    if min(scenario.query_lens) < 1:
        raise UsageError(f"{where}: query_lens must be positive, got {min(scenario.query_lens)}.")
    if min(scenario.history) < 0:
        raise UsageError(f"{where}: history must not be negative, got {min(scenario.history)}.")
    if max(scenario.final_lens) > MAX_COUNT:
        raise UsageError(f"{where}: no request may grow beyond {MAX_COUNT} tokens.")


def select(scenarios: Sequence[Scenario], names: Sequence[str]) -> list[Scenario]:
    """Return the named scenarios, or all if none are named. Raises `UsageError`."""
    known = {scenario.name: scenario for scenario in scenarios}
    for name in names:
        if name not in known:
            hint = did_you_mean(name, list(known))
            raise UsageError(f"unknown scenario '{name}'.{hint} This workload has: {', '.join(known)}.")
    return [known[name] for name in dict.fromkeys(names)] if names else list(scenarios)
