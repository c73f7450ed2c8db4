#!/usr/bin/env python3
"""How the time of our decode step grows with history, batch and heads, and the gain of a second thread.

\b
    python benchmarks/peers/scaling.py --folder benchmarks/results
    python benchmarks/peers/scaling.py --plot FILE-threads1.json FILE-threads2.json

Each thread count runs in its own process and writes an ordinary result file. The curves are drawn from these
files, as an SVG next to them with the machine in its title.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))

import click

from benchmarks.peers.run import defaults
from mla.bench import results
from mla.bench.plan.resolve import resolve
from mla.bench.run import scheduler
from mla.bench.run.scheduler import verdict
from mla.bench.workload.grid import Point
from mla.command import console, files
from mla.command.exit_codes import guarded
from mla.config import presets
from mla.errors import MLAError
from mla_backends import host

# Axis -> its values; the other axes stay at `USUAL`.
AXES: dict[str, tuple[int, ...]] = {
    "history": (128, 512, 2048, 8192, 32768),
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "heads": (8, 16, 32, 64, 128),
}
USUAL = {"history": 1024, "batch": 16, "heads": 16}
# In the metadata of our figures: only a file with it is overwritten.
CREATOR = "python benchmarks/peers/scaling.py"
FIGURE = files.Kind("a figure of this command", lambda data: f"<dc:title>{CREATOR}<".encode() in data)
LABELS = {"history": "tokens of history", "batch": "requests", "heads": "heads"}


class NothingToPlot(MLAError):
    """Result files without the points of a curve, or matplotlib is missing."""


def scenario(axis: str, value: int, steps: int, passes: int) -> Point:
    """Return decoding at one point of a curve."""
    at = {**USUAL, axis: value}
    return Point(
        name=f"{axis}-{value}",
        base=axis,
        point={axis: value},
        mode="decode",
        query_lens=(1,) * at["batch"],
        history=(at["history"],) * at["batch"],
        heads=at["heads"],
        runs=steps,
        passes=passes,
        warmups=2,
    )


def measure(config: str, threads: int, steps: int, passes: int, output: Path) -> int:
    """Measure all points in this process and write the result file."""
    points = [(axis, value) for axis, values in AXES.items() for value in values]
    wanted = [scenario(axis, value, steps, passes) for axis, value in points]
    chosen = defaults(config=config, threads=threads, implementations="mla", output=output)
    request = resolve(chosen)
    outcome = scheduler.measure(request.replanned(wanted, request.implementations))
    outcome.run.argv = ["python benchmarks/peers/scaling.py", *sys.argv[1:]]
    results.write(outcome.run, output)
    return verdict(outcome)


def new_figure() -> Any:
    """Return an empty figure. Raises `NothingToPlot` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NothingToPlot(f"plotting needs matplotlib: pip install '.[report]' ({error}).") from error
    return Figure(figsize=(12, 7), layout="constrained")


def plot(sources: Sequence[Path], output: Path) -> None:
    """Draw one panel per axis and one of the speed-up, a line per file. Raises `NothingToPlot`."""
    runs = [results.read(source) for source in sources]
    figure = new_figure()
    panels = dict(zip([*AXES, "speed-up"], figure.subplots(2, 2).flat, strict=True))
    for run in runs:
        for axis in AXES:
            _curve(panels[axis], axis, run)
    _speed_up(panels["speed-up"], runs)
    figure.suptitle(_title(runs[0]), fontsize=10)
    figure.savefig(output, format="svg", metadata={"Date": None, "Creator": CREATOR})


def _points(run: results.Run, axis: str) -> dict[int, results.Latency]:
    cases = [case for case in run.cases if case.base == axis and case.latency_ms]
    found = {int(case.point[axis]): case.latency_ms for case in cases if case.latency_ms}
    if not found:
        raise NothingToPlot(f"a result file has no points over {axis}: use files written by this command.")
    return found


def _threads(run: results.Run) -> int:
    return int(run.environment["torch_threads"])


def _curve(panel: Any, axis: str, run: results.Run) -> None:
    """Draw the medians over one axis, with their 95 % intervals if known, on log scales."""
    points = _points(run, axis)
    medians = [latency.median for latency in points.values()]
    bounds = [latency.ci95 or (latency.median, latency.median) for latency in points.values()]
    label = f"{_threads(run)} thread{'s' * (_threads(run) > 1)}"
    panel.plot(list(points), medians, marker="o", label=label)
    panel.fill_between(list(points), *zip(*bounds, strict=True), alpha=0.2)
    panel.set(xscale="log", yscale="log", xlabel=LABELS[axis], ylabel="ms per decode step")
    panel.set_xticks(list(points), [str(value) for value in points])
    panel.set_xticks([], minor=True)
    rest = ", ".join(f"{LABELS[other]} {value}" for other, value in USUAL.items() if other != axis)
    panel.set_title(rest, fontsize=9)
    panel.legend()


def _speed_up(panel: Any, runs: Sequence[results.Run]) -> None:
    """Draw the speed-up of the run with the most threads over the one with the fewest, over every axis."""
    few, many = min(runs, key=_threads), max(runs, key=_threads)
    for axis in AXES:
        slow, fast = _points(few, axis), _points(many, axis)
        shared = [value for value in slow if value in fast]
        positions = [value / USUAL[axis] for value in shared]
        panel.plot(
            positions, [slow[v].median / fast[v].median for v in shared], marker="o", label=LABELS[axis]
        )
    panel.axhline(_threads(many) / _threads(few), color="grey", linestyle=":")
    panel.set(xscale="log", xlabel="multiple of the usual value", ylabel="speed-up", ylim=(0, None))
    panel.set_title(f"{_threads(few)} to {_threads(many)} threads", fontsize=9)
    panel.legend()


def _title(run: results.Run) -> str:
    kernels = run.environment.get("backend.kernels", "unknown")
    machine = f"{run.backend.device}, {run.environment['cpus']} CPUs, kernels {kernels}"
    facts = (run.config["name"], machine, f"torch {run.environment['torch']}", run.created[:10])
    return f"{' · '.join(facts)} · commit {(run.git_commit or 'unknown')[:8]}"


@click.command(help=__doc__)
@click.option("--config", default=presets.DEFAULT_CONFIG, show_default=True, help="Preset, or a config.json.")
@click.option("--steps", default=20, show_default=True, help="Decode steps of a pass.")
@click.option("--passes", default=6, show_default=True, help="Passes; a 95% interval needs 6.")
@click.option(
    "--folder", type=click.Path(path_type=Path), default=".", help="Where to write results.  [here]"
)
@click.option(
    "--threads", type=click.IntRange(1), help="Only measure with this many threads, in this process."
)
@click.option(
    "--plot", "sources", type=click.Path(path_type=Path), nargs=2, help="Only draw these two files."
)
def scaling(
    config: str, steps: int, passes: int, folder: Path, threads: int | None, sources: tuple[Path, Path] | None
) -> int:
    """Carry out the command line. Whatever keeps a file from being written shows before anything runs."""
    name = f"scaling-{Path(config).stem}"
    if threads:
        output = folder / f"{name}-threads{threads}.json"
        files.check_writable(output, files.RESULT)
        return measure(config, threads, steps, passes, output)
    output = (sources[1].parent if sources else folder) / f"{name}.svg"
    files.check_writable(output, FIGURE)
    new_figure()
    if not sources:
        counts = sorted({1, host.cpu_limit()})
        shared = ["--config", config, "--steps", str(steps), "--passes", str(passes), "--folder", str(folder)]
        for count in counts:
            words = [sys.executable, __file__, *shared, "--threads", str(count)]
            if code := subprocess.run(words, check=False).returncode:
                return code
        first, last = (folder / f"{name}-threads{counts[place]}.json" for place in (0, -1))
        sources = (first, last)
    plot(sources, output)
    console.out(f"wrote {output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: scaling(standalone_mode=False)))
