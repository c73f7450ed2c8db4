"""`ceilings`: measure a device without the layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mla.bench import results
from mla.bench.plan.validate import check_dtype
from mla.bench.terminal import ceilings as terminal
from mla.command import environment, files
from mla.command.backend import MEASURED_BACKEND_HELP, BackendOptions, backend_options, open_backend
from mla.command.console import note, out
from mla.command.exit_codes import Exit, end_early
from mla.command.options import FILE, result_path
from mla.errors import UsageError, did_you_mean
from mla.text import DTYPES

if TYPE_CHECKING:
    import torch

    from mla_backends.api import Backend

DEFAULT_DTYPES = ("bf16", "fp32")


@dataclass(frozen=True)
class CeilingOptions(BackendOptions):
    """The options of `ceilings`, one field each."""

    dtype: str | None
    output: Path | None
    kind: str

    def dtype_names(self) -> list[str]:
        """Return what --dtype lists, under torch's names. Raises `UsageError`."""
        words = list(DEFAULT_DTYPES) if self.dtype is None else self.dtype.split(",")
        names = [DTYPES.get(word.strip(), word.strip()) for word in words]
        for name in names:
            if name not in DTYPES.values():
                known = [*DTYPES, *DTYPES.values()]
                raise UsageError(
                    f"unknown dtype '{name}'.{did_you_mean(name, known)} --dtype takes {', '.join(DTYPES)}, "
                    "comma-separated."
                )
        return list(dict.fromkeys(names))


@click.command(short_help="A device's peak bandwidth and FLOP rate.")
@backend_options(MEASURED_BACKEND_HELP)
@click.option(
    "--dtype",
    metavar="A,B",
    help="Dtypes of products: bf16, fp16, fp32. Default: bf16 and fp32, as far as they are native.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=FILE,
    callback=result_path,
    help="Write the complete result as JSON; `show` prints it again. %t is the task's number under srun or "
    "torchrun, %j the job's.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(terminal.FORMATS),
    default="table",
    show_default=True,
    help="Format of what is printed on stdout.",
)
def ceilings(**values: Any) -> int:
    """Measure peak bandwidth and FLOP rate of a device.

    Takes 10 to 30 seconds. On a slow CPU, what has not begun after a minute is left out and named.

    Reading and copying of footprints from 256 KiB to beyond the last-level cache, square products, and those
    of the default config's projections with 16 and 704 tokens; each in the way that was fastest, next to the
    peaks that the backend declares.

    Exit code 0; 2 for a mistake; 3 if the backend cannot be used; 5 if nothing could be measured; 130 if
    interrupted, 143 by SIGTERM, 129 by SIGHUP.
    """
    options = CeilingOptions(**values)
    if mixed := environment.mixed_installation():
        note(mixed)
    names = options.dtype_names()
    options.key_values()  # a mistake shows before anything is opened
    if options.output:
        files.check_writable(options.output, files.RESULT)
    from mla.bench.run.ceilings import all_tasks, report, run_tasks

    opened = open_backend(options)
    dtypes = _native(opened.backend, names, explicit=options.dtype is not None)
    found = run_tasks(all_tasks(opened.backend, dtypes))
    result = report(opened, found)
    try:
        if options.output:
            results.write(result, options.output)
    finally:
        if not files.is_stdout(options.output):
            out(terminal.render(result, options.kind))
    if found.interrupted:
        return end_early()
    return Exit.OK if found.ceilings else Exit.NOTHING_RAN


def _native(backend: Backend, names: list[str], *, explicit: bool) -> list[torch.dtype]:
    """Return the dtypes to measure; those the user named must be native, others are skipped."""
    import torch

    dtypes = [getattr(torch, name) for name in names]
    if explicit:
        for dtype in dtypes:
            check_dtype(backend, dtype)
    native = backend.dtypes()
    return [dtype for dtype in dtypes if dtype in native] or list(native)
