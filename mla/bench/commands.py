"""What the commands do: find the backend, say what will be measured, run, print, write."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mla.bench import environment, render, results
from mla.bench.exits import Exit
from mla.bench.options import DEFAULT_CONFIG, RunOptions
from mla.bench.progress import Progress, Reading
from mla.bench.workload import Scenario, WorkloadError
from mla.errors import MLAError
from mla_backends import status
from mla_backends.discovery import locate

if TYPE_CHECKING:
    import torch

    from mla.bench.implementations import Setting
    from mla.bench.session import Outcome, Request
    from mla.config import MLAConfig
    from mla_backends.api import Backend


class NoBackend(MLAError):
    """No backend was named and none or several could be meant."""


def note(text: str) -> None:
    """Print a remark where it cannot disturb the result."""
    with contextlib.suppress(BrokenPipeError):  # `2>&1 | head` must not end the run
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def out(text: str) -> None:
    """Print part of the result."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # a name may not fit the terminal's
    try:
        print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)  # noqa: T201
    except BrokenPipeError:
        # The reader went away (`| head`): not an error of ours. click would exit with 1.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(options: RunOptions) -> int:
    """Carry out `run`."""
    request = prepare(options)
    if options.list_ops:
        return _list_ops(request.setting)
    _describe(request)
    _require_memory(request)
    if options.dry_run:
        return Exit.OK
    outcome = measure(request)
    try:
        if options.output:
            results.write(outcome.run, options.output)
    finally:  # the numbers must survive a disk that has filled up
        if outcome.run.cases:
            out(render.render(outcome.run, options.kind))
            for remark in render.noise(outcome.run):
                note(remark)
    return verdict(outcome)


def prepare(options: RunOptions) -> Request:
    """Resolve what the user asked for and open the backend; every mistake shows here, before any work."""
    if mixed := environment.mixed_installation():
        note(mixed)
    scenarios = options.chosen_scenarios()
    options.check_checkpoint(scenarios)
    if options.output:
        results.check_writable(options.output)
    name = _only_usable() if options.backend is None else options.backend
    return _request(options, name, _open(options, name), scenarios)


def measure(request: Request) -> Outcome:
    """Run a request with a progress bar."""
    from mla.bench import session

    with Progress(session.total_forwards(request)) as progress:
        return session.execute(request, progress.advance, note)


def verdict(outcome: Outcome) -> Exit:
    """Return the exit code of a run, and say on stderr why it is not 0. Raises what made the run fail."""
    if outcome.failure is not None:
        raise outcome.failure
    if outcome.interrupted:
        note("interrupted: the result holds what was measured until then")
        return Exit.INTERRUPTED
    if any(case.check.status == "wrong" for case in outcome.run.cases):
        note("wrong result: at least one implementation disagrees with the oracle and got no number")
        return Exit.WRONG
    return Exit.OK if any(case.latency_ms for case in outcome.run.cases) else Exit.NOTHING_RAN


def _open(options: RunOptions, name: str) -> Backend:
    import mla

    backend: Backend = mla.load_backend(name, options.device, options.threads, options.key_values())
    return backend


def _only_usable() -> str:
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


def _request(options: RunOptions, name: str, backend: Backend, scenarios: list[Scenario]) -> Request:
    import torch

    from mla.bench import lanes, session
    from mla.bench.implementations import Setting

    dtype = getattr(torch, options.dtype)
    _check_dtype(backend, dtype)
    if options.page_size < 1 or options.page_size & (options.page_size - 1):
        raise WorkloadError(f"--page-size must be a power of two, got {options.page_size}.")
    config = _config(options)
    state = _weights(options, config, dtype) if options.model_path else None
    setting = Setting(config, backend, dtype, options.attention, options.page_size, options.seed, options.ops)
    names = session.resolve_implementations(_implementations(options), setting, note)
    ways = lanes.choose(backend, options.mode, options.cache, options.clock)
    return session.Request(setting, scenarios, names, options.command(name), _version(name), state, ways)


def _implementations(options: RunOptions) -> list[str]:
    """Return the names to run; `transformers` joins a checkpoint's run unasked only where it is installed."""
    from mla.bench import peers

    names = options.implementation_names()
    if options.implementations or not options.model_path:
        return names
    try:
        peers.require()
    except peers.PeerError as error:
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
    from mla.presets import PRESETS

    if options.model_path:
        if not options.model_path.is_dir():
            problem = "is no folder" if options.model_path.exists() else "does not exist"
            raise WorkloadError(
                f"--model-path '{options.model_path}' {problem}: it takes a folder with config.json and "
                "safetensors."
            )
        refuse_other_formats(options.model_path)
        return MLAConfig.from_pretrained(options.model_path)
    name = DEFAULT_CONFIG if options.config is None else options.config
    path = "/" in name or name.endswith(".json") or os.path.isdir(name)
    return MLAConfig.from_pretrained(name) if path and name not in PRESETS else MLAConfig.preset(name)


def _check_dtype(backend: Backend, dtype: object) -> None:
    native = backend.dtypes()
    if dtype not in native:
        listed = ", ".join(str(one).removeprefix("torch.") for one in native)
        raise WorkloadError(
            f"backend '{backend.name}' does not compute {str(dtype).removeprefix('torch.')} natively; "
            f"choose --dtype from: {listed}."
        )


def _version(name: str) -> str | None:
    return locate(name).version


def _list_ops(setting: Setting) -> int:
    from mla.bench import session

    out("".join(f"{line}\n" for line in session.make_ops(setting).explain()))
    return Exit.OK


def _require_memory(request: Request) -> None:
    from mla.bench import session

    session.plan(request).require()


def _describe(request: Request) -> None:
    """Say on stderr what is about to be measured."""
    from mla.bench import memory, session

    setting = request.setting
    plan = session.plan(request)
    info = setting.backend.device_info()
    facts = environment.environment(setting.backend)
    names = session.make_ops(setting).names()
    fused = [f"{role}={name}" for role, name in names.items() if name != "reference"]
    note(
        f"backend    {setting.backend.name} on {info.name}, torch {facts['torch']}, "
        f"{facts['torch_threads']} threads"
    )
    note(
        f"config     {setting.config.name}, {setting.dtype}, attention {setting.attention}, "
        f"page size {setting.page_size}, seed {setting.seed}"
    )
    note(f"ops        {', '.join(fused) or 'reference for every op'} (--list-ops says why)")
    for scenario in request.scenarios:
        note(f"scenario   {_scenario_line(scenario)}")
    if len(request.lanes.kinds) > 1:
        note(f"timed      {request.lanes}")
    together = "in turns" if plan.side_by_side else "one at a time"
    note(
        f"plan       {', '.join(request.implementations)}, {together}; "
        f"{session.total_forwards(request)} forwards or more, checked against a float64 oracle"
    )
    count = plan.implementations if plan.side_by_side else 1
    note(
        f"memory     {memory.gib(plan.device_bytes(count))} on the device, "
        f"{memory.gib(plan.host)} on the host; available {memory.gib(plan.device_available)} "
        f"and {memory.gib(plan.host_available)}"
    )


def _scenario_line(scenario: Scenario) -> str:
    size = f"{len(scenario.query_lens)} requests, {scenario.tokens} new tokens per forward, "
    lengths = f"history {min(scenario.history)} to {max(scenario.history)}, "
    return f"{scenario.name}: {size}{lengths}{scenario.turns} passes of {scenario.steps}"


def list_configs(as_json: bool) -> int:
    """Carry out `list --configs`."""
    from mla.bench.list_configs import as_objects, as_table

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
    from mla.bench import doctor

    if mixed := environment.mixed_installation():
        note(mixed)
    report = doctor.examine(name)
    facts = {**asdict(report), "usable": report.usable}
    out(json.dumps(facts, indent=1) + "\n" if as_json else doctor.as_text(report))
    return Exit.OK if report.usable else Exit.BACKEND


def new_backend(name: str, folder: Path) -> int:
    """Carry out `new-backend`."""
    from mla.bench.new_backend import create, next_commands

    create(name, folder)
    out(next_commands(name, folder))
    return Exit.OK
