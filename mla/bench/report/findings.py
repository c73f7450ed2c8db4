"""What can be seen in a picture, in words: its accessible description and alternative text. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from mla.bench.report.roofline_data import RooflineData
from mla.bench.report.series import Curves, Quantity, ReportEntry, grouped, shared_limit, with_numbers
from mla.bench.results.compare import Comparison
from mla.bench.results.schema import Case
from mla.bench.terminal import verdict
from mla.bench.terminal.digits import known, number
from mla.bench.terminal.stages import wholes
from mla.bench.terminal.verdict import status

# Most things that are told one by one, and most verdicts.
MOST, MOST_VERDICTS = 6, 3


def sentence(parts: Iterable[str], what: str) -> str:
    """Return the parts as a sentence; if they are many, the first and how many more there are."""
    told = list(parts)
    rest = len(told) - MOST
    more = [f"and {rest} more {what}"] * (rest > 0)
    return "; ".join([*told[:MOST], *more]) + "." if told else f"No {what}."


def of_bars(entries: Sequence[ReportEntry], names: Sequence[str], quantity: Quantity) -> str:
    """Return the verdicts of the report, the limit if it is one, what has no number, and every bar."""
    named = list(zip(entries, names, strict=True))
    shared = shared_limit(entries, quantity)
    lead = [f"{text}." for text in _verdicts(entries)]
    lead += [f"The limit is {number(shared)} {quantity.unit}."] * bool(shared)
    lead += [f"{name} has no number: {status(one.case)}." for one, name in named if not with_numbers([one])]
    bars = [
        (found, name, quantity.limit(one.case)) for one, name in named if (found := quantity.of(one.case))
    ]
    bars.sort(key=lambda bar: bar[0].value, reverse=quantity.higher_is_better)
    told = [
        f"{name} {found} {quantity.unit}" + f" (limit {number(limit)})" * (bool(limit) and not shared)
        for found, name, limit in bars
    ]
    return " ".join([*lead, sentence(told, "bars")])


def _verdicts(entries: Sequence[ReportEntry]) -> Iterator[str]:
    """Yield what the report says of each scenario of each file, if they are few: no other is the winner."""
    groups = grouped(entries, lambda one: (one.file.key, one.case.scenario))
    several = len({scenario for _, scenario in groups}) > 1
    if len(groups) <= MOST_VERDICTS:
        for (key, scenario), members in groups.items():
            cases = [case for case in members[0].file.run.cases if case.scenario == scenario]
            where = ", ".join(filter(None, (key, scenario if several else "")))
            yield f"{where}: ".removeprefix(": ") + verdict.of_scenario(scenario, cases).text


def of_curves(group: Curves, quantity: Quantity) -> str:
    """Return where every line begins and ends."""
    return sentence((_of_line(group, place, quantity) for place in range(len(group.lines))), "lines")


def _of_line(group: Curves, place: int, quantity: Quantity) -> str:
    line = group.lines[place]
    found = [(x, m) for x, entry in line.points if (m := quantity.of(entry.case))]
    name = group.label(line)
    lost = f", no number at {len(line.absent)} places" * bool(line.absent)
    if not found:
        return f"{name} has no {quantity.name}{lost}"
    (first, low), (last, high) = found[0], found[-1]
    return f"{name}: {low} {quantity.unit} at {first:g} to {high} at {last:g}{lost}"


def of_roofline(data: RooflineData) -> str:
    """Return how near every case comes to its limit, the nearest first."""
    ranked = sorted(data.dots, key=lambda dot: -(dot.entry.case.roofline.fraction or 0))
    return sentence((_of_dot(dot.entry.case) for dot in ranked), "cases")


def _of_dot(case: Case) -> str:
    limit, name = case.roofline, f"{case.scenario}, {case.implementation}"
    if limit.doubt:
        return f"{name}: in doubt"
    if limit.fraction is None:
        return f"{name}: no limit is known"
    return f"{name}: {100 * limit.fraction:.0f} % of the {limit.bound} limit"


def of_stages(entries: Sequence[ReportEntry], names: Sequence[str]) -> str:
    """Return the longest stages of every case."""
    return sentence(map(_of_stage, names, [entry.case for entry in entries]), "cases")


def _of_stage(name: str, case: Case) -> str:
    longest = sorted(wholes(case.stages), key=lambda stage: -stage.ms)[:3]
    told = ", ".join(f"{stage.name} {number(stage.ms)} ms" for stage in longest)
    latency = case.latency_ms
    whole = f" of {known(latency.median, latency.ci95)} ms" if latency else ""
    return f"{name}: longest are {told}{whole}"


def of_multiples(names: Sequence[str], multiples: Sequence[Sequence[tuple[str, float]]]) -> str:
    """Return every multiple by its row and its kind."""
    told = [
        f"{', '.join(filter(None, (name, kind)))}: {value:.3g} times"
        for name, row in zip(names, multiples, strict=True)
        for kind, value in row
    ]
    return sentence(told, "times")


def of_scaling(rows: Sequence[tuple[str, float, float | None]]) -> str:
    """Return every case over ranks with its speedup and its efficiency."""
    told = [
        f"{name}: {speedup:.3g} times as fast"
        + (f", {100 * efficiency:.0f} % of the ideal" if efficiency is not None else "")
        for name, speedup, efficiency in rows
    ]
    return sentence(told, "cases")


def of_comparison(cases: Sequence[Comparison]) -> str:
    """Return the verdict and the ratio of every case."""
    told = [
        f"{one.scenario}, {one.implementation}: {one.verdict}, {one.ratio:.3g} times the time"
        for one in cases
        if one.ratio is not None
    ]
    return sentence(told, "cases")


def of_samples(entries: Sequence[ReportEntry]) -> str:
    """Return how the samples of every case are spread."""
    told = [
        f"{one.case.implementation}: median {known(latency.median, latency.ci95)} ms, "
        f"80 % lie from {number(latency.p10)} to {number(latency.p90)}"
        for one in entries
        if (latency := one.case.latency_ms)
    ]
    return sentence(told, "cases")
