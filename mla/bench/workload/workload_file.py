"""Workload files: scenarios read from TOML and fully validated before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from mla.bench.workload.grid import parse_batch_spec
from mla.bench.workload.scenario import MAX_REQUESTS, Scenario, check_lengths, repeated
from mla.errors import UsageError, did_you_mean, unknown
from mla_backends import outside
from mla_backends.outside import escaped, quoted, shortened

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STANDARD = "standard"
# The shipped workloads.
PRESETS = (
    "smoke",
    STANDARD,
    "full",
    "production-mix",
    "production-mix-mistral-small-4",
    "production-mix-kimi-k3",
    "decode-tp-sweep",
    "speculative-decode",
    "sparse",
    "sparse-layer",
)
# What a batch spec says, so that its table cannot say it again.
_FIXED_BY_SPEC = ("mode", "query_lens", "history")


class _File(msgspec.Struct, forbid_unknown_fields=True):
    scenario: list[dict[str, Any]]
    about: str = ""
    source: str = ""
    config: str | None = None
    op: str | None = None


@dataclass(frozen=True)
class Workload:
    """What a workload file says."""

    name: str  # as it was asked for
    scenarios: list[Scenario]
    about: str  # one line
    source: str  # where its lengths were published
    config: str | None  # the default of --config; a path in it is relative to the file's folder
    op: str | None  # the default of --op


def read_workload(source: str) -> Workload:
    """Read a shipped workload by name, or any by path. Raises `UsageError`."""
    where, shipped = f"workload '{source}'", resources.files("mla.bench.workload") / f"{source}.toml"
    try:
        text = shipped.read_text(encoding="utf-8") if source in PRESETS else outside.read(source).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {where}: {getattr(error, 'strerror', None) or error}.") from error
    with _blaming(f"{where} is not valid TOML"):
        document = tomllib.loads(text)
    with _blaming(where, "; it needs [[scenario]] tables"):
        file = msgspec.convert(document, _File)
    scenarios = [_scenario(where, table) for given in file.scenario for table in _one_each(where, given)]
    twice = repeated(scenario.name for scenario in scenarios)
    if not scenarios or twice:
        raise UsageError(f"{where} needs at least one scenario, each with a unique name.")
    config = _beside(source, file.config) if file.config else None
    return Workload(source, scenarios, file.about, file.source, config, file.op)


@contextmanager
def _blaming(where: str, cure: str = "") -> Iterator[None]:
    """Say what is wrong with a file and where; absurd numbers and nesting have errors of their own."""
    try:
        yield
    except (msgspec.ValidationError, ValueError, RecursionError) as error:
        raise UsageError(f"{where}: {shortened(escaped(str(error)))}{cure}.") from error


def _beside(source: str, config: str) -> str:
    """Return the config that a file names; a path in it starts at the file's own folder."""
    path = Path(source).parent / config
    return str(path) if "/" in config or config.endswith(".json") or path.is_dir() else config


def _one_each(where: str, table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a table for each batch spec that `table` lists, named after it; other tables as they are."""
    if "batch_spec" not in table:
        yield table
        return
    given = table["batch_spec"]
    specs = given if isinstance(given, list) else [given]
    if not specs or not all(isinstance(spec, str) for spec in specs):
        raise UsageError(
            f'{where}: batch_spec takes a text such as "16q1s4k", or a list of them, got {quoted(given)}.'
        )
    if said := next((key for key in _FIXED_BY_SPEC if key in table), None):
        raise UsageError(f"{where}: a batch_spec says what '{said}' would: leave '{said}' out.")
    for spec in specs:
        with _blaming(where):
            query_lens, history = parse_batch_spec(spec)
        lengths = {"mode": "prefill", "query_lens": list(query_lens), "history": list(history)}
        name = table.get("name", "")
        named = f"{name} {spec}".lstrip() if isinstance(name, str) else name  # which is refused later
        yield {**table, **lengths, "batch_spec": spec, "name": named}


def _scenario(file: str, table: dict[str, Any]) -> Scenario:
    where = f"{file}, scenario {quoted(table.get('name', '?'))}"
    _check_keys(where, table)
    with _blaming(where):
        lists: dict[str, Any] = {
            key: parse_lengths(table[key]) for key in ("query_lens", "history") if key in table
        }
        scenario = msgspec.convert({**table, **lists}, Scenario)
    check_lengths(where, scenario)
    if not scenario.name.strip() or not scenario.name.isprintable():
        raise UsageError(f"{file}: {quoted(scenario.name)} is not a valid name: use one line of text.")
    return scenario


def _check_keys(where: str, table: Mapping[str, Any]) -> None:
    """Raise `UsageError` for unknown and for missing keys."""
    fields = msgspec.structs.fields(Scenario)
    known = [field.encode_name for field in fields]
    if strange := next((key for key in table if key not in known), None):
        free = [name for name in known if "batch_spec" not in table or name not in _FIXED_BY_SPEC]
        hint = did_you_mean(strange, free)
        raise UsageError(f"{where}: unknown key {quoted(strange)}.{hint} Choose from: {', '.join(free)}.")
    missing = [field.encode_name for field in fields if field.required and field.encode_name not in table]
    if missing:
        raise UsageError(f"{where}: it has no {' and no '.join(missing)}.")


def parse_lengths(items: Any) -> tuple[int, ...]:
    """Expand [64, "50*4"] to 64, 50, 50, 50, 50. Raises ValueError."""
    lengths: list[int] = []
    for item in items if isinstance(items, list) else [items]:
        length, count = _item(item)
        if count < 1 or len(lengths) + count > MAX_REQUESTS:
            raise ValueError(f"{quoted(item)} must repeat between 1 and {MAX_REQUESTS} times")
        lengths += [length] * count
    return tuple(lengths)


def _item(item: Any) -> tuple[int, int]:
    if isinstance(item, int) and not isinstance(item, bool):
        return item, 1
    length, star, count = item.partition("*") if isinstance(item, str) else ("", "", "")
    try:
        return int(length), int(count) if star else 1
    except ValueError:
        raise ValueError(f'{quoted(item)} is neither a length nor "length*count"') from None


def select(scenarios: Sequence[Scenario], names: Sequence[str]) -> list[Scenario]:
    """Return the named scenarios, or all if none are named. Raises `UsageError`."""
    known = {scenario.name: scenario for scenario in scenarios}
    for name in names:
        if name not in known:
            raise UsageError(unknown("scenario", name, list(known), "This workload has"))
    return [known[name] for name in dict.fromkeys(names)] if names else list(scenarios)
