"""What is said on stderr before a run: the device, the layer, the plan, and what a dry run adds to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mla.bench.measure.variants import forwards
from mla.bench.plan import memory
from mla.bench.plan.estimate import SHARES, Estimator, estimator
from mla.bench.plan.memory import MemoryPlan
from mla.bench.run import scenario_run as session
from mla.bench.run.scenario_run import Request
from mla.bench.terminal import run_table
from mla.bench.workload.grid import Point
from mla.bench.workload.quantities import spoken
from mla.command import environment

Say = Callable[[str], None]

#: More scenarios than this are counted, not listed.
LISTED = 8


def plans_of(request: Request) -> list[MemoryPlan]:
    """Return the memory plan of every scenario, in their order."""
    return [session.plan(request, scenario) for scenario in request.scenarios]


def describe(request: Request, plans: Sequence[MemoryPlan], say: Say) -> None:
    """Say what is about to be measured."""
    setting = request.setting
    facts = environment.environment(setting.backend)
    names = session.make_ops(setting).names()
    fused = [f"{role}={name}" for role, name in names.items() if name != "reference"]
    name = setting.backend.device_info().name
    say(f"backend    {setting.backend.name} on {name}, torch {facts['torch']}, {_threads(facts)}")
    say(
        f"config     {setting.config.name}, {setting.dtype}, attention {setting.attention}, "
        f"page size {setting.page_size}, seed {setting.seed}"
    )
    say(f"ops        {', '.join(fused) or 'reference for every op'} (--list-ops says why)")
    for line in _scenarios(request.scenarios):
        say(f"scenario   {line}")
    if len(request.variants.timed) > 1:
        say(f"timed      {request.variants}")
    _plan(request, plans, say)


def _threads(facts: Mapping[str, str]) -> str:
    count, source = facts["torch_threads"], facts.get("backend.threads_from")
    return f"{count} thread{'' if count == '1' else 's'}{f' ({source})' if source else ''}"


def _scenarios(scenarios: Sequence[Point]) -> list[str]:
    if len(scenarios) <= LISTED:
        return [_line(scenario) for scenario in scenarios]
    points: dict[str, list[Point]] = {}
    for scenario in scenarios:
        points.setdefault(scenario.base, []).append(scenario)
    return [
        f"{base}: {len(found)} points (--dry-run lists them)" if len(found) > 1 else _line(found[0])
        for base, found in points.items()
    ]


def _line(scenario: Point) -> str:
    size = f"{len(scenario.query_lens)} requests, {scenario.tokens} new tokens per forward, "
    lengths = f"history {min(scenario.history)} to {max(scenario.history)}, "
    layers = f"{scenario.layers} layers, " if scenario.layers > 1 else ""
    return f"{scenario.name}: {size}{lengths}{layers}{scenario.rounds} passes of {scenario.steps}"


def _plan(request: Request, plans: Sequence[MemoryPlan], say: Say) -> None:
    together = (
        "in turns" if all(one.side_by_side for one in plans if one.fits) else "one at a time where they must"
    )
    say(
        f"plan       {', '.join(request.implementations)}, {together}; "
        f"{session.total_forwards(request)} forwards or more, checked against a float64 oracle"
    )
    device = max(one.device_bytes(one.implementations if one.side_by_side else 1) for one in plans)
    say(
        f"memory     {memory.gib(device)} on the device, "
        f"{memory.gib(max(one.host for one in plans))} on the host; available "
        f"{memory.gib(plans[0].device_available)} and {memory.gib(plans[0].host_available)}"
    )


def require_memory(plans: Sequence[MemoryPlan]) -> None:
    """Raise `OutOfMemory` when no scenario fits; those that do not are left out of a run with others."""
    if not any(one.fits for one in plans):
        min(plans, key=lambda one: one.device_bytes(1)).require()


def dry_run(request: Request, plans: Sequence[MemoryPlan], say: Say) -> None:
    """Say how many cases there are, and of each what memory and about what time it needs."""
    found = estimator(request.setting, request.variants.timed, measured=True)
    rows: list[tuple[str, ...]] = [
        ("case", "scenario", "implementation", "forwards", "device", "host", "about")
    ]
    for scenario, plan in zip(request.scenarios, plans, strict=True):
        rows += _rows(request, scenario, plan, found, len(rows))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    say("")
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    say("")
    fitting = [scenario for scenario, plan in zip(request.scenarios, plans, strict=True) if plan.fits]
    _total(request, fitting, found, say)


def _rows(
    request: Request, scenario: Point, plan: MemoryPlan, found: Estimator, first: int
) -> list[tuple[str, ...]]:
    needs = (memory.gib(plan.device_bytes(1)), memory.gib(plan.host))
    count = str(forwards(request.variants.timed, scenario))
    return [
        (
            str(first + place),
            scenario.name,
            name,
            count,
            *needs,
            spoken(found.seconds(scenario, [name])) if plan.fits else "does not fit, left out",
        )
        for place, name in enumerate(request.implementations)
    ]


def _total(request: Request, fitting: Sequence[Point], found: Estimator, say: Say) -> None:
    seconds = sum(found.seconds(scenario, request.implementations) for scenario in fitting)
    count = len(request.scenarios) * len(request.implementations)
    shares = ", ".join(
        f"{name} {run_table.number(100 * SHARES[name])} %"
        for name in request.implementations
        if name in SHARES
    )
    how = "measured just now" if found.measured else "nominal, since none could be measured"
    say(
        f"{count} cases, about {spoken(seconds)}, float64 oracle and checks included (limits of the device "
        f"{how}; taken to be reached: {shares})"
    )
