#!/usr/bin/env python3
"""Find the tiles and splits with which the project's own kernels are fastest on a card.

\b
    python benchmarks/gpu/tune.py sweep latent-16 --backend nvidia --out latent-16.json --budget 2m
    python benchmarks/gpu/tune.py choose --backend nvidia --sweeps . --out tuning

`sweep` goes on with its file where it was cut short; `choose` writes the tuning under the card's name.
`compile` fills Triton's cache with what all sweeps launch, in a process per core, 16 at most.

Exit codes: 0 done, 2 usage, 3 it cannot run here, 4 a tile gave a wrong result.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).resolve().parents[2]))

import click

from benchmarks.gpu.tuning import trials
from benchmarks.gpu.tuning.classes import TileClass, classes
from mla.bench.workload.scenario import duration
from mla.command import console, environment
from mla.command.display import aligned
from mla.command.exit_codes import Exit, guarded
from mla.command.options import Read
from mla.errors import UnsupportedOps
from mla_backends.triton_ops.tuning import card_file, write_tuning

if TYPE_CHECKING:
    from mla_backends.api import Backend

NAMES = tuple(classes(smoke=False))


def facts(backend: Backend) -> dict[str, str]:
    """Return card, versions and date; a sweep with other versions begins anew."""
    there = environment.environment(backend)
    known = {
        "card": backend.device_info().name,
        "torch": there["torch"],
        "triton": environment.distribution_version("triton"),
        "driver": there.get("backend.driver"),
        "date": time.strftime("%Y-%m-%d"),
    }
    return {name: value for name, value in known.items() if value}


def check_served(backend: Backend, tuned: TileClass) -> None:
    """Raise `UnsupportedOps` where the op of a class does not run."""
    from benchmarks.gpu.tuning.problems import of_shape
    from mla.layer.ops import refusals

    op = backend.ops().get(tuned.op)
    if op is None:
        raise UnsupportedOps(f"backend '{backend.name}' offers no {tuned.op}: there is nothing to tune.")
    spec = of_shape(tuned.kind, tuned.shapes[0], backend.device).case.spec
    if why := refusals(tuned.op, op, f"{tuned.kind}_attention", spec, console.note):
        raise UnsupportedOps(f"{tuned.op} does not run here: {'; '.join(why)}.")


OUTPUT = click.option(
    "--out", "output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="File to write."
)
BACKEND = click.option("--backend", default="nvidia", show_default=True, help="Backend whose card is tuned.")
BUDGET = click.option(
    "--budget", metavar="TIME", default="10m", show_default=True, type=Read(duration),
    help="Stay within this time.",
)  # fmt: skip
SMOKE = click.option("--smoke", is_flag=True, help="Tiny shapes and few tiles: try the sweep itself.")


@click.group(help=__doc__)
def tune() -> None:
    """Find tiles and splits."""


@tune.command("compile")
@BUDGET
@SMOKE
def compile_ahead(smoke: bool, budget: float) -> int:
    """Compile the tiles of all classes before they are timed."""
    from benchmarks.gpu.tuning import ahead

    end, jobs = time.monotonic() + budget, min(16, os.cpu_count() or 1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UnsupportedOps("kernels are interpreted: there is nothing to compile.")
    wanted = ahead.launches(classes(smoke).values())
    done, failed = ahead.compile_all(wanted, jobs, lambda: end - time.monotonic())
    if skipped := len(wanted) - done - failed:
        console.note(f"--budget skipped {skipped} kernels: run it again to go on")
    console.out(f"{done} of {len(wanted)} kernels compiled, {failed} failed, {jobs} at a time\n")
    return Exit.OK if done else Exit.BACKEND


@tune.command()
@click.argument("name", type=click.Choice(NAMES))
@BACKEND
@BUDGET
@SMOKE
@OUTPUT
def sweep(name: str, backend: str, smoke: bool, output: Path, budget: float) -> int:
    """Time the tiles of one class of calls."""
    from benchmarks.gpu.tuning import problems
    from benchmarks.gpu.tuning.sweep import Effort, Tuner, ops_of
    from mla import load_backend

    began, opened = time.monotonic(), load_backend(backend)
    tuned = classes(smoke)[name]
    check_served(opened, tuned)
    effort = Effort(1, 1, 0.0, 1) if smoke else Effort()
    ragged = problems.RAGGED_SMOKE if smoke else problems.RAGGED
    tried = trials.opened(output, name, facts(opened))
    tuner = Tuner(opened, tuned, ops_of(opened), output, tried, effort, ragged)
    skipped = tuner.run(lambda: budget - (time.monotonic() - began), budget)
    if skipped:
        console.note(f"--budget skipped {skipped} tiles: run it again to go on")
    return say_best(tried)


def say_best(tried: trials.Sweep) -> int:
    """Print the best tile; return the exit code."""
    wrong = [trial for trial in tried.trials if trial.wrong]
    for trial in wrong:
        console.note(f"{trial.tile or 'the tile of the backend'}: {trial.fault}")
    best, faults = tried.best(), sum(bool(trial.fault) for trial in tried.trials)
    said = f"{best.tile}: {best.mean_us:.1f} us" if best else "no tile"
    console.out(f"{said}, of {len(tried.trials)} tried and {faults} left out\n")
    if wrong:
        return Exit.WRONG
    return Exit.OK if best else Exit.BACKEND


@tune.command()
@BACKEND
@SMOKE
@click.option("--sweeps", type=click.Path(path_type=Path), required=True, help="Folder of the sweeps.")
@click.option("--out", "folder", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
def choose(backend: str, smoke: bool, sweeps: Path, folder: Path) -> int:
    """Write the tuning that sweeps speak for, named after the card."""
    every = list(classes(smoke).values())
    by_class = trials.sweeps_in(sweeps)
    best, measured = trials.chosen(every, by_class), by_class[every[0].name].facts
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / card_file(measured["card"])
    write_tuning(output, trials.tuning_of(every, best), measured)
    console.out(aligned(trials.HEADER, trials.table(every, by_class), {"calls", "tile"}))
    console.out(f"{trials.usage(output, backend, measured['card'])}\n")
    return Exit.OK


if __name__ == "__main__":
    sys.exit(guarded(lambda: tune(standalone_mode=False)))
