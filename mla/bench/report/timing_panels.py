"""Panels that relate times: other ways of timing, other files, one forward after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mla.bench.report import tables
from mla.bench.report.draw import charts
from mla.bench.report.draw.charts import Relative
from mla.bench.report.panel import MOST_ROWS, Context, Panel, case_name, cut_note, file_title, is_short
from mla.bench.report.series import (
    Measure,
    ReportEntry,
    ResultFile,
    comparisons,
    entries,
    grouped,
    spread,
    with_numbers,
)
from mla.bench.report.style import DARK, GREY, Look, Palette, Swatch
from mla.bench.report.tables import timing_name
from mla.bench.results import compare
from mla.bench.results.schema import Latency, Timing

# Most strips of samples of one file: the widest spreads are shown.
MOST_STRIPS = 24
# Most points in all strips together, and the fewest and most in one strip.
ALL_POINTS, FEWEST_POINTS, MOST_POINTS = 20_000, 100, 1200
# Colour and marker of each verdict.
VERDICTS = {
    compare.FASTER: ("#0072B2", "<"),
    compare.SLOWER: ("#D55E00", ">"),
    compare.SAME: (DARK, "s"),
    compare.UNDECIDED: (GREY, "o"),
}


def further_timings(context: Context) -> list[Panel]:
    """Return, for every file with further timings, how they relate to the headline."""
    timed = [entry for entry in context.entries if entry.case.timings]
    groups = grouped(timed, lambda entry: entry.file.key)
    return [_timings(f"timings-{place}", members) for place, members in enumerate(groups.values())]


def _timings(slug: str, entries: list[ReportEntry]) -> Panel:
    title = file_title(entries[0].file)
    looks = Palette(timing_name(timing) for entry in entries for timing in entry.case.timings)
    rows = [entry for entry in entries if _timed(entry)]
    drawn = rows[:MOST_ROWS]
    dots = [[_dot(timing, entry, looks) for timing in _timed(entry)] for entry in drawn]
    kinds = dict.fromkeys(timing_name(timing) for entry in drawn for timing in _timed(entry))
    legend = [Swatch(kind, looks[kind], looks.marker(kind)) for kind in kinds]
    label = "time, as a multiple of the headline"
    names = [case_name(entry.case) for entry in drawn]
    drawings = [charts.relative(slug, f"{title}: {label}", names, dots, label)] if drawn else []
    notes = [*cut_note(drawn, rows), *_timing_notes(entries)]
    table = tables.timings(entries)
    return Panel(slug, title, drawings, legend, notes, [table], is_short(table))


def _timed(entry: ReportEntry) -> list[Timing]:
    """Return the further timings that can be compared with the case's headline."""
    return [timing for timing in entry.case.timings if timing.latency_ms and entry.case.latency_ms]


def _timing_notes(entries: Sequence[ReportEntry]) -> Iterator[str]:
    """Yield which cases are launch bound, and why timings have no number, each reason once."""
    bound = [case_name(entry.case) for entry in entries if entry.case.launch_bound]
    if bound:
        yield f"Launch bound (the host is slower than the device): {'; '.join(bound)}."
    missing = [timing for entry in entries for timing in entry.case.timings if timing.latency_ms is None]
    groups = grouped(missing, lambda timing: (timing_name(timing), timing.check.status, timing.check.reason))
    for (name, status, reason), same in groups.items():
        yield f"{name}: {status} in {len(same)} of {len(entries)} cases{': ' * bool(reason)}{reason}."


def _dot(timing: Timing, entry: ReportEntry, looks: Palette) -> Relative:
    assert timing.latency_ms is not None
    assert entry.case.latency_ms is not None
    kind = timing_name(timing)
    return Relative(_over(timing.latency_ms, entry.case.latency_ms.median), looks[kind], looks.marker(kind))


def _over(latency: Latency, unit: float) -> Measure:
    low, high = latency.ci95 or (None, None)
    return Measure(latency.median / unit, low and low / unit, high and high / unit)


def against_base(context: Context) -> list[Panel]:
    """Return the comparison of every other file with the first."""
    base = file_title(context.files[0])
    return [
        _comparison(f"compare-{place}", f"{file_title(file)} against {base}", cases, warnings)
        for place, (file, cases, warnings) in enumerate(comparisons(context.files))
    ]


def _comparison(slug: str, title: str, cases: Sequence[compare.Comparison], warnings: Sequence[str]) -> Panel:
    rows = [case for case in cases if case.ratio is not None]
    drawn = rows[:MOST_ROWS]
    dots = [[Relative(_ratio(case), *VERDICTS[case.verdict])] for case in drawn]
    label = "time ratio: left of 1 is faster than the base"
    names = [case_name(case) for case in drawn]
    drawings = [charts.relative(slug, title, names, dots, label)] if drawn else []
    verdicts = {case.verdict for case in drawn}
    legend = [Swatch(name, *look) for name, look in VERDICTS.items() if name in verdicts]
    notes = [f"Warning: {warning}." for warning in warnings] + cut_note(drawn, rows)
    notes += ["Nothing can be compared: the table says why."] * (not rows)
    table = tables.comparison(cases)
    return Panel(slug, title, drawings, legend, notes, [table], is_short(table))


def _ratio(case: compare.Comparison) -> Measure:
    assert case.ratio is not None
    return Measure(case.ratio, *(case.interval or (None, None)))


def distributions(context: Context) -> list[Panel]:
    """Return the samples of every file's cases; if there are many, of those with the widest spread."""
    kept = [entry for file in context.files for entry in _widest(file)]
    most = max(FEWEST_POINTS, min(MOST_POINTS, ALL_POINTS // max(1, len(kept))))
    groups = grouped(kept, lambda entry: (entry.file.key, entry.case.scenario))
    return [
        _samples(context, f"samples-{place}", members, most) for place, members in enumerate(groups.values())
    ]


def _widest(file: ResultFile) -> Iterator[ReportEntry]:
    cases = with_numbers(entries([file]))
    chosen = sorted(range(len(cases)), key=lambda place: -spread(cases[place]))[:MOST_STRIPS]
    return (cases[place] for place in sorted(chosen))


def _samples(context: Context, slug: str, members: list[ReportEntry], most: int) -> Panel:
    file, scenario = members[0].file, members[0].case.scenario
    title = f"{file_title(file)}: {scenario}"
    look = Look(context.colours, Palette(()))
    drawing = charts.samples(slug, f"samples of {title}", members, most, look)
    longest = max(len(entry.case.latency_ms.samples) for entry in members if entry.case.latency_ms)
    thinned = f"Of up to {longest} samples, at most {most} are drawn: the extremes of equal intervals."
    notes = [thinned] * (longest > most)
    return Panel(slug, title, [drawing], [], notes, [tables.pass_table(members)])
