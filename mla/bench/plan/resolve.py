"""What the commands do: find the backend, say what will be measured, run, print, write."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mla.bench import results
from mla.bench.plan.options import RunOptions
from mla.bench.run.budget import Budget
from mla.bench.terminal import comparison, run_table
from mla.bench.workload import grid as axes
from mla.bench.workload.grid import Point
from mla.bench.workload.op_scenario import refuse_unused
from mla.command import environment, files, launcher
from mla.command.console import note, out
from mla.command.exit_codes import Exit, interrupted
from mla.command.progress import Progress, Reading
from mla.config.presets import DEFAULT_CONFIG
from mla.errors import MLAError, UsageError
from mla.text import dtype_name
from mla_backends import status
from mla_backends.discovery import locate

if TYPE_CHECKING:
    import torch

    from mla.bench.run.scenario_run import Request
    from mla.bench.run.scheduler import Outcome, Steering
    from mla.bench.subjects.setting import Setting
    from mla.config import MLAConfig
    from mla_backends.api import Backend


class NoBackend(MLAError):
    """No backend was named and none or several could be meant."""


def run(options: RunOptions) -> int:
    """Carry out `run`."""
    budget = Budget(options.budget)
    baseline = options.read_baseline()
    old = results.read(options.resume) if options.resume else None
    request = prepare(options)
    if options.list_ops:
        return _list_ops(request.setting)
    from mla.bench.plan import preview
    from mla.bench.run import steering as steer

    plans = preview.plans_of(request)
    preview.describe(request, plans, note)
    preview.require_memory(plans)
    if options.dry_run:
        preview.dry_run(request, plans, note)
        return Exit.OK
    show = functools.partial(_show, options.kind)
    outcome = measure(request, steer.steering(options, request, budget, old, note, show))
    try:
        if options.target:
            results.write(outcome.run, options.target)
    finally:  # the numbers must survive a disk that has filled up
        show(outcome.run)
    if missing := steer.left_out(options, request, outcome.run):
        note(missing)
    code = verdict(outcome)
    return code if code or baseline is None else _gate(options, baseline, outcome.run)


def _show(kind: str, run: results.Run) -> None:
    if run.cases:
        out(run_table.render(run, kind))
        for remark in run_table.noise(run):
            note(remark)


def _gate(options: RunOptions, baseline: results.Run, run: results.Run) -> Exit:
    """Compare with the baseline: beside the table, or on stderr where stdout is for machines."""
    text, found = comparison.compare_runs(baseline, run, f"this run against {options.baseline}", options.kind)
    (out if options.kind in ("table", "md") else note)(f"\n{text}")
    return comparison.verdict(found, options.fail_slower)


def prepare(options: RunOptions) -> Request:
    """Resolve what the user asked for and open the backend; every mistake shows here, before any work."""
    if mixed := environment.mixed_installation():
        note(mixed)
    scenarios = options.chosen_scenarios()
    options.check_checkpoint(scenarios)
    if options.target:
        files.check_writable(options.target)
    name = only_usable() if options.backend is None else options.backend
    backend = _open(options, name)
    return _request(_with_device(options, backend), name, backend, scenarios)


def measure(request: Request, steering: Steering | None = None) -> Outcome:
    """Run a request with a progress bar, or with a line per scenario where nobody would see one."""
    from mla.bench.run import scheduler as sweep

    steering = steering or sweep.Steering()
    with Progress(sweep.estimated_seconds(request)) as progress:
        if progress.hidden and len(request.scenarios) > 1:
            steering = replace(steering, log=note)
        return sweep.execute(request, progress.advance, note, steering)


def verdict(outcome: Outcome) -> Exit:
    """Return the exit code of a run, and say on stderr why it is not 0. Raises what made the run fail."""
    if outcome.failure is not None:
        raise outcome.failure
    if outcome.interrupted:
        code = interrupted()
        by = " by SIGTERM" if code == Exit.TERMINATED else ""
        note(f"interrupted{by}: the result holds what was measured until then")
        return code
    if any(case.check.status == "wrong" for case in outcome.run.cases):
        note("wrong result: at least one implementation disagrees with the oracle and got no number")
        return Exit.WRONG
    return Exit.OK if any(case.latency_ms for case in outcome.run.cases) else Exit.NOTHING_RAN


def _open(options: RunOptions, name: str) -> Backend:
    import mla

    index = launcher.local_device(note) if options.device is None else options.device
    backend: Backend = mla.load_backend(name, index, options.threads, options.key_values())
    return backend


def _with_device(options: RunOptions, backend: Backend) -> RunOptions:
    """Name the device that the launcher chose, so that `repro` commands need no launcher."""
    if options.device is not None or launcher.local_number() is None or backend.device is None:
        return options
    return replace(options, device=backend.device.index)


def only_usable() -> str:
    """Return the one usable backend. Raises `NoBackend` with what there is."""
    found = status.statuses()
    usable = [one.name for one in found if one.state == status.USABLE]
    if len(usable) == 1:
        note(f"using backend '{usable[0]}', the only usable one")
        return usable[0]
    if usable:
        raise NoBackend(f"several backends are usable: {', '.join(usable)}. Choose one with --backend.")
    error = NoBackend(
        "no backend is usable: "
        + "; ".join(f"{one.name} ({one.state})" for one in found)
        + ". `python -m mla.bench list` says why."
    )
    error.exit_code = Exit.BACKEND
    raise error


def _request(options: RunOptions, name: str, backend: Backend, scenarios: list[Point]) -> Request:
    import torch

    from mla.bench.measure import variants
    from mla.bench.run import scenario_run as session
    from mla.bench.subjects.setting import Setting

    dtype = getattr(torch, options.run_dtype(scenarios))
    dtypes = {getattr(torch, one.dtype) if one.dtype else dtype: None for one in scenarios}
    for one in dtypes:
        check_dtype(backend, one)
    page_size = options.run_page_size(scenarios)
    if page_size < 1 or page_size & (page_size - 1):
        raise UsageError(f"--page-size must be a power of two, got {page_size}.")
    config = _config(options)
    axes.check_heads(config, scenarios)
    stored = dtype if len(dtypes) == 1 else torch.float32  # each scenario rounds to its own
    state = _weights(options, config, stored) if options.model_path else None
    setting = Setting(config, backend, dtype, options.attention, page_size, options.seed, options.ops)
    scenarios = session.expand_ops(scenarios, setting)
    refuse_unused(scenarios, options.kv, options.heads)
    names = session.resolve_implementations(_implementations(options), setting, note, scenarios)
    options.check_stages(scenarios, names)
    ways = variants.choose(backend, options.mode, options.cache, options.clock)
    command, version = options.command(name), _version(name)
    return session.Request(setting, scenarios, names, command, version, state, options.stages, ways)


def _implementations(options: RunOptions) -> list[str]:
    """Return the names to run; `transformers` joins a checkpoint's run unasked only where it is installed."""
    from mla.bench.subjects import transformers_layer

    names = options.implementation_names()
    if options.implementations or not options.model_path:
        return names
    try:
        transformers_layer.require()
    except transformers_layer.TransformersMissing as error:
        note(f"transformers is left out: {error}")
        return []
    return names


def _weights(options: RunOptions, config: MLAConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Read the checkpoint's layer to the host, once for all implementations and for the oracle."""
    from mla.checkpoint import read_layer

    assert options.model_path is not None
    with Reading(f"reading {options.model_path}") as reading:
        return dict(
            read_layer(options.model_path, config, options.layer, dtype=dtype, progress=reading.advance)
        )


def _config(options: RunOptions) -> MLAConfig:
    """Return the layer to measure: a checkpoint's, a config file's, or a preset."""
    from mla.checkpoint import refuse_other_formats
    from mla.config import MLAConfig
    from mla.config.presets import PRESETS

    if options.model_path:
        if not options.model_path.is_dir():
            problem = "is no folder" if options.model_path.exists() else "does not exist"
            raise UsageError(
                f"--model-path '{options.model_path}' {problem}: it takes a folder with config.json and "
                "safetensors."
            )
        refuse_other_formats(options.model_path)
        return MLAConfig.from_pretrained(options.model_path)
    name = DEFAULT_CONFIG if options.config is None else options.config
    path = "/" in name or name.endswith(".json") or os.path.isdir(name)
    return MLAConfig.from_pretrained(name) if path and name not in PRESETS else MLAConfig.preset(name)


def check_dtype(backend: Backend, dtype: object) -> None:
    """Raise `UsageError` for a dtype that the device only emulates."""
    native = backend.dtypes()
    if dtype not in native:
        listed = ", ".join(dtype_name(one) for one in native)
        raise UsageError(
            f"backend '{backend.name}' does not compute {str(dtype).removeprefix('torch.')} natively; "
            f"choose --dtype from: {listed}."
        )


def _version(name: str) -> str | None:
    return locate(name).version


def _list_ops(setting: Setting) -> int:
    from mla.bench.run import scenario_run as session

    out("".join(f"{line}\n" for line in session.make_ops(setting).explain()))
    return Exit.OK


def list_configs(as_json: bool) -> int:
    """Carry out `list --configs`."""
    from mla.bench.terminal.configs import as_objects, as_table

    out(json.dumps(as_objects(), indent=1) + "\n" if as_json else as_table())
    return Exit.OK


def list_backends(as_json: bool) -> int:
    """Carry out `list`."""
    found = status.statuses()
    if as_json:
        out(json.dumps([asdict(one) for one in found], indent=1) + "\n")
        return Exit.OK
    width = max(len(one.name) for one in found)
    for one in found:
        version = f" {one.distribution} {one.version}" if one.distribution else ""
        why = "; ".join(part for part in (one.reason, one.hint) if part)
        out(f"{one.name:{width}}  {one.state}{version}{': ' + why if why else ''}\n")
    return Exit.OK


def doctor(name: str | None, as_json: bool) -> int:
    """Carry out `doctor`."""
    from mla.bench.doctor import diagnosis

    if mixed := environment.mixed_installation():
        note(mixed)
    report = diagnosis.examine(name)
    facts = {**asdict(report), "usable": report.usable}
    out(json.dumps(facts, indent=1) + "\n" if as_json else diagnosis.as_text(report))
    return Exit.OK if report.usable else Exit.BACKEND


def new_backend(name: str, folder: Path) -> int:
    """Carry out `new-backend`."""
    from mla.bench.scaffold.new_backend import create, next_commands

    create(name, folder)
    out(next_commands(name, folder))
    return Exit.OK
