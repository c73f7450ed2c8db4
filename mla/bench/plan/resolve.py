"""From the options of a run to the request that running and printing read: every mistake shows here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mla.bench import results
from mla.bench.measure import variants
from mla.bench.plan import options as commands
from mla.bench.plan.options import DEFAULT_DTYPE, DEFAULT_PAGE_SIZE, RunOptions
from mla.bench.results.cases import added_baselines
from mla.bench.workload import grid
from mla.bench.workload.grid import Point, batch_scenarios, expand_ops, op_of_batch, op_scenario
from mla.bench.workload.implementations import is_ours, parse_one
from mla.bench.workload.scenario import Scenario
from mla.bench.workload.workload_file import Workload, read_workload, select
from mla.command import files, launcher
from mla.command.console import note
from mla.command.display import BYTES, Progress
from mla.command.options import OpenedBackend, open_backend
from mla.config.presets import DEFAULT_CONFIG
from mla.errors import UsageError
from mla.parallel.layout import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, IDEAL, Layout, Link
from mla_backends.errors import first_line

if TYPE_CHECKING:
    import torch

    from mla.bench.plan.request import Request
    from mla.bench.subjects.setting import Ranks, Setting
    from mla.config import MLAConfig
    from mla.verify.layer_oracle import State

# Meets the other ranks, or makes simulated ones, once the backend is open (`mla.bench.ranks`).
Join = Callable[[RunOptions, OpenedBackend, Layout], Any]


def resolve(options: RunOptions, join: Join | None = None, resumed: results.Run | None = None) -> Request:
    """Judge the options, open the backend and return what will run; `join` is needed for `--parallel`.

    A run that continues `resumed` keeps the baselines that were added to that one.

    Raises `UsageError`, `ResultError`, `RanksError` or a `BackendError`.
    """
    given = options
    options, points = _points(options)
    options = with_link(options)
    words = ("eager", "warm", "host") if options.parallel else (options.mode, options.cache, options.clock)
    wanted = variants.parse(*words)
    for file, kind in ((options.target, files.RESULT), (options.profile, files.TRACE)):
        if file is not None:
            files.check_writable(file, kind)
    opened = open_backend(options)
    setting, state = _layer(options, points, opened, join)
    from mla.bench.plan.request import Request, plan_scenarios
    from mla.bench.subjects.setting import implementation_setting, scenario_setting, with_each_op
    from mla.layer.ops import layer_roles

    roles = layer_roles(setting.config, setting.dtype, setting.device)
    points = expand_ops(points, setting.config, {role: kind for role, (kind, _) in roles.items()})
    listed = _listed_implementations(options, points, setting.config)
    settings = [scenario_setting(setting, point) for point in points]
    timed = {point.op for point in points}
    listed = list(dict.fromkeys(each for name in listed for each in with_each_op(settings, name, timed)))
    ours = {name: parse_one(name) for name in listed or ["mla"] if is_ours(name)}
    asked = {name: dict(implementation_setting(setting, named).overrides) for name, named in ours.items()}
    commands.refuse(commands.of_roles(options, points, asked))
    cold = "cold" in (wanted.get("cache") or ("cold",))
    baselines = _added_baselines(setting.config, resumed) if options.is_first_look else []
    plans, names = plan_scenarios(setting, points, listed, cold, state, baselines)
    if not listed and "mla-reference" not in names:
        note("mla-reference is skipped: no fused op was chosen, so it is identical to mla")
    return Request(
        setting=setting,
        scenarios=plans,
        implementations=names,
        added=[name for name in baselines if name in names],
        command=commands.common_options(options, opened.name, opened.device),
        selection=commands.selection(options),
        options=given,
        backend_version=opened.version,
        state=state,
        variants=variants.available(wanted, opened.backend),
    )


# ----------------------------------------------------------------------------------------- scenarios


def _points(options: RunOptions) -> tuple[RunOptions, list[Point]]:
    """Return the scenarios of the command line, and the options with a workload's own defaults.

    Raises `UsageError`.
    """
    values = {name: getattr(options, name) for name in ("cache_format", "index_format", *commands.SELECTS)}
    short = [f"{name}={value}" for name, value in values.items() if value is not None]
    options = replace(options, axes=(*options.axes, *short))
    axes = grid.parse(options.axes)  # what the user wrote is judged before any file
    scenarios: Sequence[Scenario] = batch_scenarios(options.batch_specs) if options.batch_specs else ()
    workload = None
    if not options.batch_specs and (options.op is None or options.workload_flag):
        workload = read_workload(options.workload_name)
        scenarios = select(workload.scenarios, options.scenarios)
    commands.refuse(commands.of_options(options, axes, workload.op if workload else None))
    if workload:
        options = _with_defaults(options, workload, scenarios)
        axes = grid.parse(options.axes)
    if options.op is not None:
        alone = op_scenario(options.op, options.batch, options.kv, options.q_len, options.heads)
        scenarios = [op_of_batch(options.op, each, options.heads) for each in scenarios] or [alone]
    elif options.batch_specs and options.heads is not None:
        axes = {**axes, "heads": (options.heads,)}
    counts = {name: getattr(options, name) for name in ("runs", "passes", "warmups", "layers")}
    given = {name: count for name, count in counts.items() if count is not None}
    points = grid.points_of([msgspec.structs.replace(each, **given) for each in scenarios], axes)
    commands.refuse(commands.of_points(options, points))
    return options, points


def _with_defaults(options: RunOptions, workload: Workload, scenarios: Sequence[Scenario]) -> RunOptions:
    """Return the options with the config and the op of the workload, unless the user named others.

    An option that one of the scenarios has an axis for replaces it, as an axis of the command line does, and
    becomes one.
    """
    config = workload.config if (options.config, options.model_path) == (None, None) else options.config
    op = workload.op if options.op is None else options.op
    given = {axis.partition("=")[0] for axis in options.axes}
    own = {axis for scenario in scenarios for axis in scenario.axes} - given
    moved = {name: getattr(options, name) for name in ("dtype", "page_size") if name in own}
    more = [f"{name}={value}" for name, value in moved.items() if value is not None]
    none: dict[str, Any] = dict.fromkeys(moved)
    return replace(options, config=config, op=op, axes=(*options.axes, *more), **none)


# ---------------------------------------------------------------------------------------------- link

_MEASURE = "`torchrun --nproc-per-node 2 -m mla.bench --parallel tp=2 -o real.json`"


def with_link(options: RunOptions) -> RunOptions:
    """Return the options of a simulation with its link in numbers, and where these are from.

    Raises `UsageError` and `ResultError`.
    """
    layout, text = options.parallel, (options.link or IDEAL).strip()
    if not options.simulate or layout is None:
        return options
    if text == IDEAL or "alpha=" in text:
        link, source = Link.parse(text), "given" if text != IDEAL else "none given: collectives take no time"
    elif not Path(text).exists():
        raise UsageError(
            f"--link takes alpha=5us,beta=300GB/s, the result file of a run over real ranks, or ideal, got "
            f"'{text}'. {_MEASURE} measures a link."
        )
    else:
        spreads = [case.spread for case in results.read(Path(text)).cases if case.spread]
        measured = next((each for each in spreads if each.link and not each.predicted), None)  # all are alike
        if measured is None:
            raise UsageError(f"'{text}' holds no measured link; a run over real ranks does: {_MEASURE}.")
        link = Link({line.collective: line.line() for line in measured.link})
        source = f"{measured.link_source}, {Path(text).name}"
    kinds = [ALL_REDUCE] * (layout.head_parts > 1) + [ALL_GATHER, ALL_TO_ALL] * (layout.dcp > 1)
    if missing := link.missing(kinds):
        raise UsageError(
            f"--link '{options.link}' lacks {missing[0]}, needed by layout '{layout}': add "
            f"'{missing[0]}:alpha=5us,beta=300GB/s' to it."
        )
    return replace(options, link=str(link), link_source=source)


# ------------------------------------------------------------------------------------- layer and ranks


def _layer(
    options: RunOptions, points: Sequence[Point], opened: OpenedBackend, join: Join | None
) -> tuple[Setting, State | None]:
    """Return the run's setting and, of a checkpoint, the weights."""
    import torch

    from mla.bench.subjects.setting import Setting

    dtype = getattr(torch, options.dtype or points[0].dtype or DEFAULT_DTYPE)
    dtypes = dict.fromkeys(getattr(torch, point.dtype) if point.dtype else dtype for point in points)
    for dtype_needed in dtypes:
        commands.refuse(commands.of_dtype(opened.backend, dtype_needed))
    config = _config(options)
    commands.refuse(commands.of_layer(options, config, points))
    stored = dtype if len(dtypes) == 1 else torch.float32  # each scenario rounds to its own
    state = _weights(options, config, stored) if options.model_path else None
    page_size = options.page_size
    if page_size is None:
        page_size = points[0].page_size or DEFAULT_PAGE_SIZE
    spread = options.parallel is not None and options.parallel.dcp > 1  # a part of a context is absorbed
    attention, seed, ops = "absorbed" if spread else options.attention, options.seed, options.ops
    ranks = _ranks(options, opened, config, points, join)
    formats = {point.cache_format for point in points}
    stored_as = formats.pop() if len(formats) == 1 else None
    given = (config, opened.backend, dtype, attention, page_size, seed, ops)
    return Setting(*given, ranks=ranks, cache_format=stored_as), state


def _ranks(
    options: RunOptions, opened: OpenedBackend, config: MLAConfig, points: Sequence[Point], join: Join | None
) -> Ranks | None:
    """Return the other ranks of the run; None for one device. Raises `UsageError` and `RanksError`."""
    layout = options.parallel
    if layout is None:
        return None
    for point in points:
        layout.check(config.with_heads(point.heads) if point.heads else config)
        if layout.dp > len(point.query_lens):
            raise UsageError(
                f"layout '{layout}' needs {layout.dp} requests or more, and '{point.name}' has "
                f"{len(point.query_lens)}: add requests, or lower dp to {len(point.query_lens)}."
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
    with Progress(None, f"reading {options.model_path}", BYTES) as reading:
        layer = read_layer(options.model_path, config, options.layer, dtype=dtype, progress=reading.reach)
        if config.index_n_heads and not layer.config.index_n_heads:
            raise UsageError(
                f"layer {options.layer} of '{options.model_path}' shares another's selection: choose one "
                "with an indexer, such as --layer 0."
            )
        return dict(layer)


# ------------------------------------------------------------------------------------ implementations


def _added_baselines(config: MLAConfig, resumed: results.Run | None) -> list[str]:
    """Return what a first look is compared with: the implementation of `transformers`, if that works here."""
    if resumed is not None and resumed.plan is not None:
        return [name for name in resumed.plan.implementations if name in added_baselines(resumed)]
    from mla.bench.subjects import transformers_layer

    try:
        if importlib.util.find_spec("transformers") is None:
            return []
        transformers_layer.require()
        transformers_layer.transformers_model(config)
    except Exception as error:  # noqa: BLE001  # of a library that the run does not need
        note(f"transformers is skipped: {first_line(error) or type(error).__name__}")
        return []
    return ["transformers"]


def _listed_implementations(options: RunOptions, points: Sequence[Point], config: MLAConfig) -> list[str]:
    """Return the implementations that were named, or that a checkpoint brings. Raises `UsageError`."""
    from mla.bench.subjects import transformers_layer
    from mla.bench.subjects.fixture import check_name

    names = options.implementation_names
    if config.index_topk and options.implementations is None and names:
        note("transformers is skipped: it does not report which tokens its indexer selects")
        return []
    for name in names:
        check_name(parse_one(name).base)
    for name in options.foreign:  # what would be refused all the same is not to be installed first
        if options.op is not None:
            raise UsageError(
                f"{name} runs the whole layer: {options.op} alone is timed of mla and mla-reference."
            )
        if any(point.layers > 1 for point in points):
            raise UsageError(f"{name} runs one layer at a time: leave it out, or --layers.")
    try:
        if any(name.startswith("transformers") and ":" not in name for name in options.foreign):
            transformers_layer.require()
    except transformers_layer.TransformersMissing as error:
        if options.implementations:
            raise
        note(f"transformers is skipped: {error}")  # a checkpoint is compared only where it is installed
        return []
    return names
