"""From the options of a run to the request that planning, running and printing read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mla.bench.measure import variants
from mla.bench.plan import repro, scenarios, validate
from mla.bench.plan.link import with_link
from mla.bench.plan.options import RunOptions
from mla.bench.workload import grid
from mla.bench.workload.grid import Point
from mla.bench.workload.implementations import is_ours, parse_one
from mla.bench.workload.op_scenario import expand_ops
from mla.command import environment, files, launcher
from mla.command.backend import OpenedBackend, open_backend
from mla.command.console import note
from mla.command.progress import Reading
from mla.config.presets import DEFAULT_CONFIG
from mla.errors import UsageError
from mla.parallel.layout import Layout

if TYPE_CHECKING:
    import torch

    from mla.bench.plan.request import Request, ScenarioPlan
    from mla.bench.subjects.setting import Ranks, Setting
    from mla.config import MLAConfig
    from mla.parallel.layout import Layout
    from mla.verify.layer_oracle import State


# Meets the other ranks, or makes simulated ones, once the backend is open (`mla.bench.ranks`).
Join = Callable[[RunOptions, OpenedBackend, Layout], Any]


def resolve(options: RunOptions, join: Join | None = None) -> Request:
    """Judge the options, open the backend and return what will run; mistakes show before any work.

    `join` is needed for `--parallel`.
    """
    if mixed := environment.mixed_installation():
        note(mixed)
    options, points = _points(options)
    options = with_link(options)
    one = ("eager", "warm", "host") if options.parallel else (options.mode, options.cache, options.clock)
    wanted = variants.parse(*one)
    for file, kind in ((options.target, files.RESULT), (options.profile, files.TRACE)):
        if file is not None:
            files.check_writable(file, kind)
    return _request(options, points, wanted, open_backend(options), join)


def _points(options: RunOptions) -> tuple[RunOptions, list[Point]]:
    """Return the scenarios of the command line, and the options with a workload's own defaults.

    Raises `UsageError`.
    """
    grid.parse(options.axes)  # what the user wrote is judged before any file
    validate.check_lengths(options)
    workload = scenarios.chosen_workload(options)
    by_file = workload.op if workload is not None and options.op is None else None
    options = scenarios.with_defaults(options, workload)
    axes = grid.parse(options.axes)
    validate.check_options(options, axes, by_file)
    points = scenarios.choose_points(options, axes, workload)
    validate.check_points(options, points)
    validate.check_stages(options, points)
    return options, points


def _request(
    options: RunOptions,
    points: Sequence[Point],
    wanted: variants.Wanted,
    opened: OpenedBackend,
    join: Join | None,
) -> Request:
    setting, state = _layer(options, points, opened, join)
    with setting.ranks.told() if setting.ranks else contextlib.nullcontext():
        return _planned(options, points, wanted, opened, setting, state)


def _planned(
    options: RunOptions,
    points: Sequence[Point],
    wanted: variants.Wanted,
    opened: OpenedBackend,
    setting: Setting,
    state: State | None,
) -> Request:
    from mla.bench.plan.request import Request

    points = _expanded(points, setting)
    validate.check_op_uses_shape(options, points)
    plans, names = _plans(options, points, setting, state, cold="cold" in (wanted.caches or ("cold",)))
    validate.check_own_ops(options, points, _overrides(setting, names))
    return Request(
        setting=setting,
        scenarios=plans,
        implementations=names,
        command=repro.common_options(options, opened),
        selection=repro.selection(options),
        backend_version=opened.version,
        state=state,
        stages=options.stages,
        warmups=options.warmups,
        counted=(options.runs, options.passes) != (None, None),
        profile=options.profile,
        variants=variants.available(wanted, opened.backend),
    )


def _layer(
    options: RunOptions, points: Sequence[Point], opened: OpenedBackend, join: Join | None
) -> tuple[Setting, State | None]:
    """Return the run's setting and, of a checkpoint, the weights."""
    import torch

    from mla.bench.subjects.setting import Setting

    dtype = getattr(torch, scenarios.run_dtype(options, points))
    dtypes = dict.fromkeys(getattr(torch, point.dtype) if point.dtype else dtype for point in points)
    for one in dtypes:
        validate.check_dtype(opened.backend, one)
    config = _config(options)
    validate.check_heads(config, points)
    stored = dtype if len(dtypes) == 1 else torch.float32  # each scenario rounds to its own
    state = _weights(options, config, stored) if options.model_path else None
    page_size = scenarios.run_page_size(options, points)
    spread = options.parallel is not None and options.parallel.dcp > 1  # a part of a context is absorbed
    attention, seed, ops = "absorbed" if spread else options.attention, options.seed, options.ops
    ranks = _ranks(options, opened, config, points, join)
    return Setting(config, opened.backend, dtype, attention, page_size, seed, ops, ranks=ranks), state


def _ranks(
    options: RunOptions,
    opened: OpenedBackend,
    config: MLAConfig,
    points: Sequence[Point],
    join: Join | None,
) -> Ranks | None:
    """Return the other ranks of the run; None for one device. Raises `UsageError` and `RanksError`."""
    layout = options.parallel
    if layout is None:
        return None
    for point in points:
        layout.check(config.with_heads(point.heads) if point.heads else config)
        if layout.dp > len(point.query_lens):
            raise UsageError(
                f"layout '{layout}' splits the requests of '{point.name}' {layout.dp} ways, and there "
                f"{'is one' if len(point.query_lens) == 1 else f'are {len(point.query_lens)}'}."
            )
    assert join is not None
    ranks: Ranks = join(options, opened, layout)
    return ranks


def _config(options: RunOptions) -> MLAConfig:
    """Return the layer to measure: a checkpoint's, a config file's, or a preset."""
    from mla.checkpoint import refuse_other_formats
    from mla.config import MLAConfig

    if options.model_path:
        if not options.model_path.is_dir():
            problem = "is not a folder" if options.model_path.exists() else "does not exist"
            raise UsageError(
                f"--model-path '{options.model_path}' {problem}: it takes a folder with config.json and "
                "safetensors."
            )
        refuse_other_formats(options.model_path)
        return MLAConfig.from_pretrained(options.model_path)
    name = DEFAULT_CONFIG if options.config is None else options.config
    return MLAConfig.named(name)


def _weights(options: RunOptions, config: MLAConfig, dtype: torch.dtype) -> State:
    """Read the checkpoint's layer to the host, once for all implementations and for the oracle.

    Ranks without an oracle leave it on disk, where each reads its own part.
    """
    from mla.checkpoint import read_layer

    assert options.model_path is not None
    if options.parallel and not options.simulate and launcher.rank():
        return read_layer(options.model_path, config, options.layer, dtype=dtype)
    with Reading(f"reading {options.model_path}") as reading:
        return dict(
            read_layer(options.model_path, config, options.layer, dtype=dtype, progress=reading.advance)
        )


def _expanded(points: Sequence[Point], setting: Setting) -> list[Point]:
    """Return the scenarios, each op replaced by the roles it has in this layer. Raises `UsageError`."""
    from mla.layer.ops import layer_roles

    roles = layer_roles(setting.config, setting.dtype, setting.device)
    return expand_ops(points, setting.config, {role: kind for role, (kind, _) in roles.items()})


def _plans(
    options: RunOptions, points: Sequence[Point], setting: Setting, state: State | None, *, cold: bool
) -> tuple[list[ScenarioPlan], list[str]]:
    """Return every scenario with its needs, and the implementations to run."""
    from mla.bench.plan.request import plan_scenarios

    listed = _listed_implementations(options, points)
    plans, names = plan_scenarios(setting, points, listed, cold, state)
    if not listed and names == ["mla"]:
        note("mla-reference is skipped: no fused op was chosen, so it is identical to mla")
    return plans, names


def _overrides(setting: Setting, names: Sequence[str]) -> dict[str, list[str]]:
    """Return implementation -> the roles that it has ops of its own for."""
    from mla.bench.subjects.setting import implementation_setting

    ours = {name: parse_one(name) for name in names if is_ours(name)}
    return {
        name: [role for role, _ in implementation_setting(setting, named).overrides]
        for name, named in ours.items()
    }


def _listed_implementations(options: RunOptions, points: Sequence[Point]) -> list[str]:
    """Return the implementations that were named, or that a checkpoint brings. Raises `UsageError`."""
    from mla.bench.subjects import transformers_layer
    from mla.bench.subjects.fixture import check_name

    names = options.implementation_names
    for name in names:
        check_name(parse_one(name).base)
    other = next((name for name in names if not is_ours(name)), None)
    if other is None:
        return names
    try:
        if "transformers" in other or not options.implementations:
            transformers_layer.require()
    except transformers_layer.TransformersMissing as error:
        if not options.implementations:  # a checkpoint is compared only where it is installed
            note(f"transformers is skipped: {error}")
            return []
        missing: Exception | None = error
    else:
        missing = None
    if options.op is not None:
        raise UsageError(
            f"{other} runs the whole layer: {options.op} alone is timed of mla and mla-reference."
        )
    if any(point.layers > 1 for point in points):
        raise UsageError(f"{other} runs one layer at a time: leave it out, or --layers.")
    if missing:
        raise missing
    return names
