"""The scenarios that the options ask for: a workload's, or one op, with counts and grids of the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from mla.bench.plan.options import DEFAULT_DTYPE, DEFAULT_PAGE_SIZE, RunOptions
from mla.bench.workload import grid
from mla.bench.workload.batch_spec import batch_scenarios
from mla.bench.workload.grid import Axes, Point
from mla.bench.workload.op_scenario import op_of_batch, op_scenario
from mla.bench.workload.scenario import Scenario
from mla.bench.workload.workload_file import Workload, read_workload, select


def chosen_workload(options: RunOptions) -> Workload | None:
    """Return the workload to run; None for batch specs, and for an op of equal requests.

    Raises `UsageError`.
    """
    alone = options.op is not None and options.workload_flag is None
    return None if options.batch_specs or alone else read_workload(options.workload_name)


def with_defaults(options: RunOptions, workload: Workload | None) -> RunOptions:
    """Return the options with the config and the op of a workload that names them, unless the user did.

    An option that a chosen scenario has an axis for replaces it, as an axis of the command line does, and
    becomes one. Raises `UsageError`.
    """
    if workload is None:
        return options
    config = options.config
    if config is None and options.model_path is None:
        config = workload.config
    op = workload.op if options.op is None else options.op
    own = {axis for scenario in select(workload.scenarios, options.scenarios) for axis in scenario.axes}
    own -= {axis.partition("=")[0] for axis in options.axes}
    options = replace(options, config=config, op=op)
    if options.dtype is not None and "dtype" in own:
        options = replace(options, dtype=None, axes=(*options.axes, f"dtype={options.dtype}"))
    if options.page_size is not None and "page_size" in own:
        options = replace(options, page_size=None, axes=(*options.axes, f"page_size={options.page_size}"))
    return options


def choose_points(options: RunOptions, axes: Axes, workload: Workload | None) -> list[Point]:
    """Return the scenarios to run, one per point of the grids. Raises `UsageError`."""
    if options.batch_specs and options.op is None and options.heads is not None:
        axes = {**axes, "heads": (options.heads,)}
    return grid.points_of(_counted(options, workload), axes)


def _counted(options: RunOptions, workload: Workload | None) -> list[Scenario]:
    """Return the scenarios that were chosen, or the op, with the counts that the user set."""
    counts = {
        "runs": options.runs,
        "passes": options.passes,
        "warmups": options.warmups,
        "layers": options.layers,
    }
    changes = {name: count for name, count in counts.items() if count is not None}
    return [msgspec.structs.replace(scenario, **changes) for scenario in _chosen(options, workload)]


def _chosen(options: RunOptions, workload: Workload | None) -> Sequence[Scenario]:
    listed: Sequence[Scenario] = batch_scenarios(options.batch_specs) if options.batch_specs else ()
    if workload is not None:
        listed = select(workload.scenarios, options.scenarios)
    if options.op is None:
        return listed
    if not listed:
        return [op_scenario(options.op, options.batch, options.kv, options.q_len, options.heads)]
    return [op_of_batch(options.op, one, options.heads) for one in listed]


def run_dtype(options: RunOptions, points: Sequence[Point]) -> str:
    """Return the dtype of the run; with an axis of dtypes, that of its first point."""
    return options.dtype or points[0].dtype or DEFAULT_DTYPE


def run_page_size(options: RunOptions, points: Sequence[Point]) -> int:
    """Return the page size of the run; with an axis of page sizes, that of its first point."""
    return points[0].page_size or DEFAULT_PAGE_SIZE if options.page_size is None else options.page_size
