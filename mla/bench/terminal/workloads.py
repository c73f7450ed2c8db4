"""`list --workloads`: the shipped workloads, what they measure and where their lengths were published."""

from __future__ import annotations

from typing import Any

from mla.bench.workload.grid import points_of
from mla.bench.workload.workload_file import PRESETS, read_workload
from mla.command.table import aligned
from mla.config.presets import DEFAULT_CONFIG

_HEADER = ("name", "scenarios", "config", "op", "about", "source")
_WORDS = ("name", "config", "op", "about", "source")  # aligned left


def as_table() -> str:
    """Return a table with one line per shipped workload; "-" means none."""
    rows = ([str(value) if value else "-" for value in one.values()] for one in as_objects())
    return aligned(_HEADER, map(tuple, rows), words=_WORDS)


def as_objects() -> list[dict[str, Any]]:
    """Return per shipped workload its number of scenarios, its default config and op, and its source."""
    return list(map(_facts, PRESETS))


def _facts(name: str) -> dict[str, Any]:
    workload = read_workload(name)
    return {
        "name": name,
        "scenarios": len(points_of(workload.scenarios, {})),
        "config": workload.config or DEFAULT_CONFIG,
        "op": workload.op,
        "about": workload.about,
        "source": workload.source,
    }
