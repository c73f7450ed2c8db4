"""`run`: measure one layer, or one op, on one device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import click

from mla.bench import results
from mla.bench.cli.stored import verdict as compared_verdict
from mla.bench.plan.options import RunOptions
from mla.bench.results.cases import labelled
from mla.bench.results.file import printable
from mla.bench.run.watchdog import Budget
from mla.bench.terminal import run_table
from mla.bench.terminal.lines import OTHERS, folded_warnings, quality_warnings
from mla.bench.terminal.tables import compared
from mla.bench.workload.implementations import parse_one
from mla.command import files, last_words
from mla.command.console import note, out, verbose
from mla.command.environment import OtherLoad
from mla.command.exit_codes import Exit, graver
from mla.command.options import HELP_NAMES, GroupedCommand, takes
from mla.errors import UsageError

if TYPE_CHECKING:
    from mla.bench.plan.request import Request
    from mla.bench.results.compare import Comparison
    from mla.bench.run.scheduler import Outcome
    from mla.command.options import OpenedBackend
    from mla.parallel.layout import Layout

EPILOG = """\b
Examples:
  mla-bench --backend cpu
  mla-bench --backend cpu --config deepseek-r1 --runs 10 -o run.json
  mla-bench --backend cpu --implementations 'mla,mla[latent_attention=reference]'
  mla-bench --backend cpu --scenario decode -a kv=1k..16k*4 -a batch=1,16 -o sweep.json
  mla-bench --backend cpu --preset full --budget 10m -o full.json
  mla-bench --backend cpu --op latent_attention --batch 64 --kv 4k
  mla-bench --backend cpu --batch-spec 4q8s2049_16q1s3072 --heads 8
  mla-bench --backend cpu --config deepseek-r1 --parallel tp=8,dcp=4 --simulate
  mla-bench --backend my_module:MyBackend --workload mine.toml --dry-run
  mla-bench compare before.json after.json --fail-slower 3%
  mla-bench report before.json after.json -o report.html
  mla-bench export run.json --format csv -o run.csv

\b
MLA_SUPERVISE=0 in the environment keeps the work in one process, as some debuggers and profilers need.

\b
Exit codes:
  0 ok
  1 regression (or, with --fail-slower, a case that was lost)
  2 usage, or a result that cannot be written (-o, stdout)
  3 backend missing, unusable or hung, the device does not exist, an op raised
    or ended the process, or every case of mla was refused
  4 wrong result
  5 nothing ran (no case of mla, if any was asked for)
  6 a suspect timing, or with --strict an unreliable one
  130 interrupted, 143 ended by SIGTERM, 129 by SIGHUP (the partial result is
    written)
"""


@click.command(
    cls=GroupedCommand,
    context_settings=HELP_NAMES,
    epilog=EPILOG,
    short_help="Time a layer, or one op, on a backend (default).",
)
@takes(RunOptions)
def run(options: RunOptions) -> int:
    """Measure one MLA layer on one device.

    By default the two standard scenarios run with the deepseek-v2-lite config: a prefill of 4 requests with
    704 new tokens, and 100 decode steps of 16 requests. Where transformers is installed, such a run compares
    with it as well; no exit code depends on that. Outputs are checked against a float64 oracle before
    timing and in every pass. stdout carries the result, stderr everything else.
    """
    budget = Budget(options.budget)
    baseline = results.read(options.baseline) if options.baseline else None
    if options.resume and not options.output and files.is_stream(options.resume):
        raise UsageError(f"'{options.resume}' is a pipe and cannot be rewritten: give -o FILE.")
    old = results.read(options.resume) if options.resume else None
    from mla.bench.plan.resolve import resolve

    request = resolve(options, _ranks, old)
    measure = partial(_run, budget=budget, old=old, baseline=baseline)
    if options.parallel and not options.simulate:
        return _run_on_ranks(request, measure)
    return _list_ops(request) if options.list_ops else measure(request)


def _ranks(options: RunOptions, opened: OpenedBackend, layout: Layout) -> Any:
    """Meet the other ranks, or make simulated ones; torch is imported only then."""
    if options.simulate:
        from mla.bench.ranks.simulation import Simulation
        from mla.parallel.layout import Link

        assert options.link is not None
        return Simulation(layout, Link.parse(options.link), options.link_source)
    from mla.bench.ranks.launch import join

    return join(options, opened, layout)


def _run_on_ranks(request: Request, measure: Callable[[Request], int]) -> int:
    """Run on rank 0, which has the others do their part; the others end as it does."""
    from mla.bench.ranks.crew import Crew, facts
    from mla.bench.ranks.layers import Follower

    crew = request.setting.ranks
    assert isinstance(crew, Crew)
    with crew:
        request = crew.agreed(request, facts(request))
        if crew.rank:
            with last_words.while_running(request.setting.backend.name):
                return Follower(request, crew).follow()
        return crew.end(_list_ops(request) if request.options.list_ops else measure(request))


def _list_ops(request: Request) -> Exit:
    """Print what the policy chooses, and what each implementation with ops of its own runs instead."""
    from mla.bench.subjects.setting import implementation_setting, make_ops

    named = [parse_one(name) for name in request.implementations]
    overriding = [impl for impl in named if impl.ops]
    if len(overriding) < len(named):
        out("".join(f"{line}\n" for line in make_ops(request.setting).explain()))
    for impl in overriding:
        lines = make_ops(implementation_setting(request.setting, impl)).explain()
        out(f"{impl}:\n" + "".join(f"  {line}\n" for line in lines))
    return Exit.OK


def _run(request: Request, budget: Budget, old: results.Run | None, baseline: results.Run | None) -> int:
    """Say what will run, run it, write it and print it."""
    from mla.bench.plan.request import description, dry_run, empty_run, require_memory
    from mla.bench.run import scheduler
    from mla.bench.run.scheduler import verdict
    from mla.bench.run.steering import steering

    options = request.options
    verbose(options.detail == "verbose")
    if options.detail != "quiet" or options.dry_run:
        for line in description(request, options.detail == "verbose" or options.dry_run):
            note(line)
    require_memory(request)
    if options.dry_run:
        with last_words.while_running(request.setting.backend.name):
            dry_run(request)
        return Exit.OK
    empty = empty_run(request)
    course = steering(request, empty, budget, old, lambda run: _show(options, run))
    load = OtherLoad()
    with last_words.while_running(request.setting.backend.name):
        outcome = scheduler.measure(request, empty, course)
    kept = {(case.scenario, case.implementation) for case in course.kept}
    new = any(
        case.latency_ms and (case.scenario, case.implementation) not in kept for case in outcome.run.cases
    )
    if new and (options.simulate or not options.parallel):  # otherwise the others are ranks of this run
        _note_load(load, outcome.run)
    _report(request, outcome)
    compared = _compare(options, baseline, outcome.run)
    code = verdict(outcome)
    if outcome.interrupted:
        return code
    code = graver(code, _reliable(options, outcome.run))
    if compared is not None:
        chosen = (options.scenarios, options.batch_specs, options.axes, options.op, options.implementations)
        code = graver(code, compared_verdict(compared, options.fail_slower, selected=any(chosen)))
    if options.profile is None:
        return code
    from mla.bench.run.profile import profile

    return profile(request, outcome.run, options.profile, budget, code)  # everything else is done by now


def _note_load(load: OtherLoad, run: results.Run) -> None:
    """Keep how many CPUs others used meanwhile, where this run's threads needed them.

    What was kept of an earlier run keeps what that run said of it.
    """
    facts = run.environment
    threads = int(facts["torch_threads"]) if facts["processor"] == run.backend.device else 1
    if busy := load.remark(threads):
        facts.setdefault(OTHERS, busy)


def _report(request: Request, outcome: Outcome) -> None:
    """Write the result file, print the table, and name what a budget cut."""
    from mla.bench.run.steering import skipped

    options = request.options
    try:
        if options.target:
            results.write(outcome.run, options.target)
    finally:  # the numbers must survive a disk that has filled up
        _show(options, outcome.run)
    if missing := skipped(request, outcome.run):
        note(missing)


def _show(options: RunOptions, run: results.Run) -> None:
    if run.cases:
        run = printable(run)  # what a plugin says of itself and of its device goes to a terminal as well
        if not files.is_stdout(options.target):
            detail = cast("run_table.Detail", options.detail or "short")
            out(run_table.render(run, options.kind, detail, _next(options)))
        warn = quality_warnings if options.detail == "verbose" else folded_warnings
        for warning in [] if options.detail == "quiet" else warn(labelled(run)):
            note(warning)


def _next(options: RunOptions) -> str:
    """Return what a reader of the short table may want next."""
    saved = [] if options.target else ["-o run.json saves the run"]
    batch = [] if options.batch_specs or options.op else ["--batch-spec 16q1s4k times your own batch"]
    return ", ".join(["-v shows details", *saved, *batch])


def _compare(options: RunOptions, baseline: results.Run | None, run: results.Run) -> list[Comparison] | None:
    """Compare with the baseline: below the table, or on stderr where stdout is for machines."""
    if baseline is None or not run.cases:
        return None
    table, cases = compared(baseline, run, f"this run against {options.baseline}")
    apart = options.kind not in ("table", "md") or files.is_stdout(options.target)
    (note if apart else out)(f"\n{table.text(options.kind)}")
    return cases


def _reliable(options: RunOptions, run: results.Run) -> Exit:
    """Return the exit code of --strict, and say on stderr why it is not 0."""
    lines = run_table.unreliable_headlines(labelled(run)) if options.strict else []
    for line in lines:
        note(f"--strict: {line}; rerun when idle")
    return Exit.DOUBTFUL if lines else Exit.OK
