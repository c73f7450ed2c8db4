#!/usr/bin/env python3
"""The command line of the original MLA test, as a thin front end of `mla.bench`.

\b
    python benchmarks/attention_test.py --cpu
    python benchmarks/attention_test.py --nvidia --model_path DeepSeek-R1-Layer-3

Both standard scenarios run through the same engine, with the same checks, and are printed in the original's
format: figures are means, over all passes where the original had one. Without --model_path the config is
deepseek-v2-lite, the original's own. The flag of a device without a plugin says how to measure it today.
Errors and exit codes are those of `python -m mla.bench`.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

import click

from mla.bench.plan import options
from mla.bench.plan.resolve import resolve
from mla.bench.results.schema import Case, Run
from mla.bench.run.scheduler import measure, verdict
from mla.command import console
from mla.command.exit_codes import guarded
from mla_backends.known import KNOWN, WITHOUT_PLUGIN

# Flag -> whose it is: all platforms of InfiniCore's tests.
DEVICES = {
    **{name: backend.device for name, backend in KNOWN.items()},
    **{
        name: f"{entry.device} (no plugin yet: says how to run today)"
        for name, entry in WITHOUT_PLUGIN.items()
    },
}
TITLES = {"mla": "Custom", "transformers": "Transformers"}
WIDTH = 78


def defaults(**changes: object) -> options.RunOptions:
    """Return the runner's options with its own defaults for everything not in `changes`."""
    from mla.bench.cli.run import run

    context = run.make_context("run", [])
    return options.RunOptions(**{**context.params, **changes})


def banner(text: str) -> str:
    """Return text between two rules."""
    return f"{'=' * WIDTH}\n{text}\n{'=' * WIDTH}"


def average(case: Case) -> str:
    """Return the original's figure: mean latency of a prefill, mean throughput of a decode pass."""
    if case.latency_ms is None:
        return f"no number ({case.check.status}: {case.check.reason})"
    mean = statistics.fmean(case.latency_ms.samples)
    if case.mode == "prefill":
        return f"average latency per batch: {mean:.2f} ms"
    return f"average throughput: {1e3 * sum(case.query_lens) / mean:.2f} tok/s"


def report(run: Run) -> str:
    """Return everything the original prints."""
    parts = [banner("Test DeepSeek-R1 MLA (Multi-Head Latent Attention)"), ""]
    for name, title in TITLES.items():
        cases = [case for case in run.cases if case.implementation == name]
        if cases:
            parts += [banner(f"Performance Benchmark - {title} Implementation"), *map(describe, cases)]
    parts.append(banner("Test Summary"))
    for case in run.cases:
        figure = average(case).replace("average latency per batch", "Prefill Latency")
        figure = figure.replace("average throughput", "Decode Throughput")
        parts.append(f"{TITLES[case.implementation]} Implementation - {figure}")
    return "\n".join([*parts, "=" * WIDTH])


def describe(case: Case) -> str:
    """Return the two lines of one scenario, and a rule after the first."""
    lengths = {"seqlens": case.query_lens, "pastlens": case.history}
    word = "Test Case PREFILL_TESTCASES" if case.mode == "prefill" else "Test DECODE_TESTCASES"
    runs = case.passes * case.steps_per_pass if case.mode == "prefill" else case.steps_per_pass
    counts = f"WARMUPS={case.warmups} RUNS={runs}"
    line = f"{word}: {lengths}\n\t {counts}, MLA {TITLES[case.implementation]}, {average(case)}\n"
    return f"{line}\n{'-' * WIDTH}\n" if case.mode == "prefill" else line


def device_flags(command: click.decorators.FC) -> click.decorators.FC:
    """Add the flag of every platform, those without a plugin included."""
    for name, device in reversed(DEVICES.items()):
        command = click.option(f"--{name}", is_flag=True, help=f"Run on {device}.")(command)
    return command


def one_device(flags: Mapping[str, bool]) -> str:
    """Return the platform that was chosen. Raises `click.UsageError` unless there is one."""
    chosen = [name for name, given in flags.items() if given]
    if len(chosen) > 1:
        both = " and ".join(f"--{name}" for name in chosen)
        raise click.UsageError(f"{both} are several devices: run once for each of them.")
    if not chosen:
        raise click.UsageError(f"choose a device: {', '.join(f'--{name}' for name in DEVICES)}.")
    return chosen[0]


@click.command(help=__doc__)
@device_flags
@click.option(
    "--model_path", type=click.Path(path_type=Path), help="Compare with transformers on its weights."
)
@click.option("--runs", type=click.IntRange(min=1), help="Timed forwards, and decode steps.  [100]")
def attention_test(model_path: Path | None, runs: int | None, **flags: bool) -> int:
    """Run both standard scenarios on one device."""
    names = "mla,transformers" if model_path else "mla"
    headline = {"mode": "eager", "cache": "warm", "clock": "host"}  # the only way the original timed
    chosen = defaults(
        backend=one_device(flags), model_path=model_path, implementations=names, runs=runs, **headline
    )
    outcome = measure(resolve(chosen))
    console.out(report(outcome.run) + "\n")
    return verdict(outcome)


if __name__ == "__main__":
    sys.exit(guarded(lambda: attention_test(standalone_mode=False)))
