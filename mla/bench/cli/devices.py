"""Commands about backends and devices: `list`, `doctor`, `new-backend`, `replay`, `ceilings`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from mla.bench import results
from mla.bench.plan.options import of_dtype, refuse
from mla.bench.terminal import ceilings as terminal
from mla.bench.workload.grid import points_of
from mla.bench.workload.workload_file import PRESETS as SHIPPED
from mla.bench.workload.workload_file import read_workload
from mla.command import files
from mla.command.console import note, out
from mla.command.display import aligned
from mla.command.environment import distribution_version
from mla.command.exit_codes import Exit, end_early
from mla.command.options import (
    FILE,
    BackendOptions,
    Read,
    Word,
    backend_options,
    format_option,
    key_values,
    open_backend,
    result_path,
    takes,
)
from mla.config import MLAConfig
from mla.config.presets import DEFAULT_CONFIG, PRESETS
from mla.errors import UsageError
from mla.text import named_dtype
from mla_backends import BackendOptionError, probe
from mla_backends.known import GENERAL, GENERAL_USE

if TYPE_CHECKING:
    import torch

    from mla_backends.api import Backend

REPLAY_EPILOG = """\b
Examples:
  mla-bench replay failed
  mla-bench replay failed --runs 100
  mla-bench replay failed --op reference

\b
Exit codes: 0 every call was right, 2 usage, 3 backend missing or unusable, 4 a call was wrong.
"""


@click.command("list", short_help="List backends and their state, presets, or workloads.")
@click.option("--configs", is_flag=True, help="Show the presets of --config and where they were read.")
@click.option(
    "--workloads", is_flag=True, help="Show the shipped workloads; --json adds where they were published."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_backends(configs: bool, workloads: bool, as_json: bool) -> int:
    """Show every installed and known backend and whether it is usable. Each is probed in its own process."""
    if configs and workloads:
        raise UsageError("--configs and --workloads are two lists: ask for one of them.")
    if workloads:
        out(_json(shipped_workloads()) if as_json else workloads_table())
    elif configs:
        out(_json(presets()) if as_json else _table(_CONFIGS, map(_row, presets()), "source"))
    else:
        out(_backends(as_json))
    return Exit.OK


def _json(document: object) -> str:
    return json.dumps(document, indent=1) + "\n"


def _backends(as_json: bool) -> str:
    backends = probe.statuses(chosen=[*probe.names(), GENERAL])
    if as_json:
        return _json(list(map(asdict, backends)))
    widths = [max(len(getattr(status, name)) for status in backends) for name in ("name", "state")]
    return "".join(_line(status, *widths) for status in backends)


def _line(status: probe.Status, name: int, state: int) -> str:
    version = f"{status.distribution} {status.version}" if status.distribution else ""
    why = "; ".join(part for part in (status.reason, status.hint) if part)
    if status.name == GENERAL and not why:
        why = f"without a plugin, {GENERAL_USE} (here {status.evidence['device']})"
    said = ": ".join(part for part in (version, why) if part)
    return f"{status.name:{name}}  {status.state:{state}}  {said}".rstrip() + "\n"


_CONFIGS = ("name", "hidden", "heads", "q_lora", "latent", "nope/v", "source")
_WORKLOADS = ("name", "scenarios", "config", "about")


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], last: str) -> str:
    """Return a table as wide as the result, whose last column is wrapped; numbers are on the right."""
    return aligned(titles, rows, ("name", "nope/v", "config", last), wrapped=(last,))


def presets() -> list[dict[str, Any]]:
    """Return per preset the config, its checkpoint, and the address of its config.json."""
    made = []
    for name, preset in PRESETS.items():
        config, read = MLAConfig.preset(name), {"checkpoint": preset.checkpoint, "source": preset.source}
        made.append({**asdict(config), "softmax_scale": config.softmax_scale, **read})
    return made


def _row(preset: dict[str, Any]) -> list[str]:
    latent = f"{preset['kv_lora_rank']}+{preset['qk_rope_head_dim']}"
    heads = f"{preset['qk_nope_head_dim']}/{preset['v_head_dim']}"
    numbers = [preset["hidden_size"], preset["num_attention_heads"], preset["q_lora_rank"] or "-"]
    return [preset["name"], *map(str, numbers), latent, heads, preset["checkpoint"]]


def workloads_table() -> str:
    """Return a table with a row per shipped workload, as wide as the result."""
    rows = [[str(workload[title]) for title in _WORKLOADS] for workload in shipped_workloads()]
    return _table(_WORKLOADS, rows, "about")


def shipped_workloads() -> list[dict[str, Any]]:
    """Return per shipped workload its number of scenarios, its default config and op, and its source."""
    said = ("op", "about", "source")
    return [
        {
            "name": workload.name,
            "scenarios": len(points_of(workload.scenarios, {})),
            "config": workload.config or DEFAULT_CONFIG,
            **{name: getattr(workload, name) for name in said},
        }
        for workload in map(read_workload, SHIPPED)
    ]


@click.command(short_help="Explain why a backend is or isn't usable.")
@click.argument("name", cls=Word, required=False, help="Backend, or package.module:attribute. Default: all.")
@click.option("-O", "backend_options", metavar="KEY=VALUE", multiple=True, help="Option of the backend NAME.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def doctor(name: str | None, backend_options: tuple[str, ...], as_json: bool) -> int:
    """Say why a backend is or is not usable, one fix per line.

    Imports torch, probes the backend, sets up its device and lists its ops for the default config, each in a
    process of its own, so that a library that aborts or hangs becomes a line of the report. If torch itself
    does not import, the faulty extension is named.

    `doctor torch -O device=NAME` does so for a device without a plugin.

    Exit code 0 if the backend, or without NAME any backend, is usable; 2 for an option that it does not
    take; 3 if it is not usable, or if there is no such backend.
    """
    from mla.bench.doctor import diagnosis

    if distribution_version("mla") and distribution_version("mla-bench"):
        again = "run `pip uninstall mla mla-bench`, then install again"
        note(f"`mla` (the old name) and `mla-bench` are both installed and own the same files: {again}")
    if backend_options and name is None:
        raise UsageError("-O is an option of one backend: name it, as in `doctor torch -O device=cpu`.")
    report = diagnosis.diagnose(name, key_values(backend_options))
    out(_json(report) if as_json else diagnosis.as_text(report))
    if any(backend["state"] == BackendOptionError.state for backend in report["backends"]):
        return Exit.USAGE
    return Exit.OK if report["usable"] else Exit.BACKEND


@click.command("new-backend", short_help="Create a plugin project for a new device.")
@click.argument(
    "name", cls=Word, help="Name of the backend and of its torch device: lower-case, like 'acme'."
)  # fmt: skip
@click.argument(
    "folder", cls=Word, metavar="DIR", type=FILE, help="Where to write it: a new folder, or an empty one."
)  # fmt: skip
def new_backend(name: str, folder: Path) -> int:
    """Write a complete project for a backend: the package with one example op, its tests, and a README.

    It is for a device that torch knows as torch.NAME once its vendor's package is imported. The project is
    written whole or not at all; the next commands to run are printed.

    Exit code 0 if it was written; 2 if NAME is not a valid name or taken, or if DIR is not empty.
    """
    from mla.bench.scaffold.new_backend import create, next_commands

    create(name, folder)
    out(next_commands(name, folder))
    return Exit.OK


@click.command(epilog=REPLAY_EPILOG, short_help="Repeat the call that --dump-failure kept.")
@click.argument("folder", type=FILE, cls=Word, help="The folder that --dump-failure named.")
@backend_options("Backend to replay on. Default: the one that failed, with its options.")
@click.option("--op", "name", metavar="NAME", help="Another op of the backend, or reference.")
@click.option("--runs", type=click.IntRange(1, 1_000_000), default=1, show_default=True, help="Calls.")
def replay(folder: Path, name: str | None, runs: int, **chosen: Any) -> int:
    """Make one call again that was wrong: the same operands in the same layout, judged by the same truth."""
    from mla.failures import file

    kept = file.read(folder)
    kept.call()  # may say that there is none
    origin, facts, options = kept.document.origin, kept.document.call, BackendOptions(**chosen)
    assert facts is not None
    if options.backend is None:
        again = (*origin.options, *options.backend_options)
        options = replace(options, backend=origin.backend, backend_options=again)
    opened = open_backend(options)
    note(f"kept       {origin.where}: {kept.document.reason}")
    wrong = [reason for reason in file.replay(kept, opened.backend, name, runs) if reason]
    what = f"{facts.role} (op '{name or facts.op}') on {opened.backend.device}"
    if wrong:
        often = f"wrong in {len(wrong)} of {runs} calls" if runs > 1 else "wrong"
        out(f"{what}: {often}: {wrong[0]}\n")
        return Exit.WRONG
    if not name:
        why = {
            True: "the op has changed since: this call was wrong by itself when it was kept",
            False: "it depends on the calls before it, as it did when it was kept",
            None: "it may depend on the calls before it, or come and go (--runs 1000)",
        }[kept.document.alone]
        note(f"the failure did not repeat: {why}")
    out(f"{what}: right{f' in {runs} of {runs} calls' if runs > 1 else ''}\n")
    return Exit.OK


# -------------------------------------------------------------------------------------------------- ceilings

DEFAULT_DTYPES = ("bfloat16", "float32")


def dtypes_of(text: str) -> list[str]:
    """Read "bf16,float32" as torch's names of them. Raises `UsageError`."""
    return list(dict.fromkeys(named_dtype(word.strip()) for word in text.split(",")))


@dataclass(frozen=True)
class CeilingOptions(BackendOptions):
    """The options of `ceilings`, one field each."""

    # fmt: off
    dtypes: Annotated[list[str] | None, click.option(
        "--dtype", "dtypes", metavar="A,B", type=Read(dtypes_of),
        help="Dtypes of products: bf16, fp16, fp32. Default: bf16 and fp32, as far as they are native.",
    )]
    output: Annotated[Path | None, click.option(
        "-o", "--output", metavar="FILE", type=FILE, callback=result_path,
        help="Write the complete result as JSON; `show` prints it again. %t is the task's number under srun "
        "or torchrun, %j the job's.",
    )]
    kind: Annotated[str, format_option(terminal.FORMATS, "Format of what is printed on stdout.")]
    # fmt: on


@click.command(short_help="Measure a device's peak bandwidth and FLOP rate.")
@takes(CeilingOptions)
def ceilings(options: CeilingOptions) -> int:
    """Measure peak bandwidth and FLOP rate of a device.

    Takes 10 to 30 seconds. On a slow CPU, what has not begun after a minute is left out and named.

    Reading and copying of footprints from 256 KiB to beyond the last-level cache, square products, and those
    of the default config's projections with 16 and 704 tokens; each in the way that was fastest, next to the
    peaks that the backend declares.

    Exit code 0; 2 for a mistake; 3 if the backend cannot be used; 5 if nothing could be measured; 130 if
    interrupted, 143 by SIGTERM, 129 by SIGHUP.
    """
    if options.output:
        files.check_writable(options.output, files.RESULT)
    from mla.bench.run.ceilings import all_tasks, report, run_tasks

    opened = open_backend(options)
    dtypes = _native(opened.backend, options.dtypes)
    result = report(opened, *run_tasks(all_tasks(opened.backend, dtypes)))
    try:
        if options.output:
            results.write(result, options.output)
    finally:
        if not files.is_stdout(options.output):
            out(terminal.render(result, options.kind))
    if result.interrupted:
        return end_early()
    return Exit.OK if result.measured else Exit.NOTHING_RAN


def _native(backend: Backend, names: Sequence[str] | None) -> list[torch.dtype]:
    """Return the dtypes to measure; those the user named must be native, others are skipped."""
    import torch

    dtypes = [getattr(torch, name) for name in names or DEFAULT_DTYPES]
    for dtype in dtypes if names else ():
        refuse(of_dtype(backend, dtype))
    native = backend.dtypes()
    return [dtype for dtype in dtypes if dtype in native] or list(native)
