"""Axes: a grid over the scenarios of a workload, one scenario per point."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from mla.bench.workload.quantities import UNITS
from mla.bench.workload.scenario import MAX_COUNT, MAX_REQUESTS, Scenario, check_lengths
from mla.errors import UsageError, did_you_mean
from mla.text import DTYPES
from mla_backends.outside import shortened

if TYPE_CHECKING:
    from mla.config import MLAConfig

# More points are a typo, or should be several runs.
MAX_POINTS = 1000

# Axis -> smallest and largest value. `dtype` takes names.
LIMITS = {
    "batch": (1, MAX_REQUESTS),
    "kv": (0, MAX_COUNT),
    "q_len": (1, MAX_COUNT),
    "heads": (1, MAX_COUNT),
    "page_size": (1, MAX_COUNT),
}
AXES = ("batch", "kv", "q_len", "heads", "dtype", "page_size")
LENGTHS = ("batch", "kv", "q_len")  # axes that a batch spec has no room for
DTYPE_NAMES = {**DTYPES, **{name: name for name in DTYPES.values()}}

Value = int | str
Axes = dict[str, tuple[Value, ...]]

_NUMBER = r"\d{1,12}[kKmM]?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})([*+])({_NUMBER})")


class Point(Scenario, frozen=True, kw_only=True):
    """A scenario to run: the workload's own, or one point of the grid over it."""

    base: str  # name of the workload's scenario
    point: dict[str, Value] = {}  # noqa: RUF012  # msgspec copies it
    dtype: str | None = None  # overrides the run's
    page_size: int | None = None  # overrides the run's

    @property
    def op(self) -> str | None:
        """The role of the op that is timed alone; None: the whole layer."""
        return None

    def expand(self, config: MLAConfig, kinds: Mapping[str, str]) -> list[Point]:
        """Return the scenarios that this one means in a layer of `config`; `kinds`: role -> op."""
        return [self]

    @property
    def selection(self) -> list[str]:
        """The command-line arguments that select this point alone."""
        axes = [word for name, value in self.point.items() for word in ("-a", f"{name}={value}")]
        return ["--scenario", self.base, *axes]


def parse(words: Sequence[str]) -> Axes:
    """Read "kv=1k..64k*4" and the like. Raises `UsageError`."""
    axes: Axes = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise UsageError(f"-a takes AXIS=VALUES, such as kv=1k..64k*4, got '{word}'.")
        if name in axes:
            raise UsageError(f"axis '{name}' is given twice: list all of its values in one -a.")
        axes[name] = _values(name, text)
    return axes


def points_of(scenarios: Sequence[Scenario], axes: Axes) -> list[Point]:
    """Return every point, scenario by scenario; the first axis varies slowest. Raises `UsageError`.

    Command-line axes replace a scenario's own axes of the same name.
    """
    grids = [(scenario, {**_own(scenario), **axes}) for scenario in scenarios]
    count = sum(math.prod(map(len, grid.values())) for _, grid in grids)
    if count > MAX_POINTS:
        raise UsageError(
            f"these axes make {count} points, but a run has at most {MAX_POINTS}: give fewer values."
        )
    points = [
        _point(scenario, dict(zip(grid, values, strict=True)))
        for scenario, grid in grids
        for values in itertools.product(*grid.values())
    ]
    names = [point.name for point in points]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"two points are named '{twice[0]}': rename the scenario of that name.")
    return points


def _own(scenario: Scenario) -> Axes:
    try:
        return {name: _values(name, _text(value)) for name, value in scenario.axes.items()}
    except (UsageError, ValueError) as error:
        raise UsageError(f"scenario '{scenario.name}': {shortened(str(error), 400)}") from error


def _text(value: Any) -> str:
    """Return a value of a TOML table in command-line form."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _values(name: str, text: str) -> tuple[Value, ...]:
    if name not in AXES:
        raise UsageError(f"unknown axis '{name}'.{did_you_mean(name, AXES)} Choose from: {', '.join(AXES)}.")
    items = [item.strip() for item in text.split(",")]
    values: list[Value] = []
    for item in items:
        values += [_dtype(item)] if name == "dtype" else _numbers(name, item)
        if len(values) > MAX_POINTS:
            raise UsageError(f"axis {name}: '{item}' exceeds {MAX_POINTS} values: give fewer.")
    return tuple(dict.fromkeys(values))


def _dtype(item: str) -> str:
    if item not in DTYPE_NAMES:
        hint = did_you_mean(item, list(DTYPE_NAMES))
        raise UsageError(f"axis dtype: unknown dtype '{item}'.{hint} Choose from: {', '.join(DTYPE_NAMES)}.")
    return DTYPE_NAMES[item]


def _numbers(name: str, item: str) -> list[int]:
    if re.fullmatch(_NUMBER, item):
        return [_checked(name, _number(item))]
    found = _RANGE.fullmatch(item)
    if found is None:
        raise UsageError(
            f"axis {name}: '{item}' is neither a number, such as 4k, nor a range, such as 1k..64k*4 "
            "or 1..8+1."
        )
    first, last, by = (_number(found[group]) for group in (1, 2, 4))
    if first > last or by < 1 or (found[3] == "*" and (by < 2 or first < 1)):
        raise UsageError(f"axis {name}: the range '{item}' does not ascend.")
    values = [_checked(name, first)]
    while len(values) <= MAX_POINTS:  # one too many tells the caller
        value = values[-1] * by if found[3] == "*" else values[-1] + by
        if value > last:
            break
        values.append(_checked(name, value))
    return values


def _number(text: str) -> int:
    digits = text.rstrip("kKmM")
    return int(digits) * UNITS[text[len(digits) :].lower()]


def _checked(name: str, value: int) -> int:
    low, high = LIMITS[name]
    if not low <= value <= high:
        raise UsageError(f"axis {name}: {value} is not between {low} and {high}.")
    if name == "page_size" and value & (value - 1):
        raise UsageError(f"axis page_size: {value} is not a power of two.")
    return value


def _point(scenario: Scenario, values: Mapping[str, Any]) -> Point:
    """Return the scenario at one point: requests repeated or truncated to `batch`, with the given lengths."""
    _check_spec(scenario, values)
    lengths = itertools.cycle(zip(scenario.query_lens, scenario.history, strict=True))
    requests = list(itertools.islice(lengths, values.get("batch", len(scenario.query_lens))))
    changes = {
        "query_lens": tuple(values.get("q_len", new) for new, _ in requests),
        "history": tuple(values.get("kv", past) for _, past in requests),
        "heads": values.get("heads", scenario.heads),
        "dtype": values.get("dtype"),
        "page_size": values.get("page_size"),
        "axes": {},
        "point": dict(values),
        "name": " ".join([scenario.name, *(f"{name}={value}" for name, value in values.items())]),
    }
    if isinstance(scenario, Point):
        point = msgspec.structs.replace(scenario, **changes)
    else:
        point = Point(base=scenario.name, **{**msgspec.structs.asdict(scenario), **changes})
    check_lengths(f"scenario '{point.name}'", point)
    return point


def _check_spec(scenario: Scenario, values: Mapping[str, Any]) -> None:
    """Raise `UsageError` for an axis of lengths over a batch spec."""
    axis = next((name for name in LENGTHS if name in values), None)
    if scenario.batch_spec and axis:
        raise UsageError(
            f"axis {axis}: the lengths of '{scenario.name}' are those of a batch spec; list a spec for each "
            f"value of {axis}, or use the axes heads, dtype and page_size."
        )
