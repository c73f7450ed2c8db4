"""The scenarios that the options ask for: a workload's, or one op, with counts and grids of the user."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mla.bench.plan.options import DEFAULT_DTYPE, DEFAULT_PAGE_SIZE, RunOptions
from mla.bench.workload import grid
from mla.bench.workload.grid import Axes, Point
from mla.bench.workload.op_scenario import op_scenario
from mla.bench.workload.scenario import Scenario, load_workload, select


def choose_points(options: RunOptions, axes: Axes) -> list[Point]:
    """Return the scenarios to run, one per point of the grids. Raises `UsageError`."""
    return grid.points_of(_counted(options), axes)


def _counted(options: RunOptions) -> list[Scenario]:
    """Return the workload's scenarios, or the op, with the counts that the user set."""
    counts = {
        "runs": options.runs,
        "passes": options.passes,
        "warmups": options.warmups,
        "layers": options.layers,
    }
    changes = {name: count for name, count in counts.items() if count is not None}
    return [msgspec.structs.replace(scenario, **changes) for scenario in _chosen(options)]


def _chosen(options: RunOptions) -> list[Scenario]:
    if options.op is not None:
        return [op_scenario(options.op, options.batch, options.kv, options.q_len, options.heads)]
    return select(load_workload(options.workload_name), options.scenarios)


def run_dtype(options: RunOptions, points: Sequence[Point]) -> str:
    """Return the dtype of the run; with an axis of dtypes, that of its first point."""
    return options.dtype or points[0].dtype or DEFAULT_DTYPE


def run_page_size(options: RunOptions, points: Sequence[Point]) -> int:
    """Return the page size of the run; with an axis of page sizes, that of its first point."""
    return points[0].page_size or DEFAULT_PAGE_SIZE if options.page_size is None else options.page_size
