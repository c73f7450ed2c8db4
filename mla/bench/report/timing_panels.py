"""Panels that relate times: other ways of timing, other files, one forward after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mla.bench.report import findings, tables
from mla.bench.report.draw import line_charts
from mla.bench.report.draw.line_charts import Relative
from mla.bench.report.draw.style import DARK, GREY, Look, Palette, Swatch
from mla.bench.report.draw.svg import Caption
from mla.bench.report.names import slug as file_name
from mla.bench.report.panel import (
    ALL_ROWS,
    Context,
    Panel,
    Picture,
    case_name,
    chunks,
    cut_note,
    file_title,
    is_short,
    numbered,
)
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
from mla.bench.report.tables import timing_name
from mla.bench.results import compare
from mla.bench.results.schema import Latency, Timing

# Most strips of samples of one file: the widest spreads are shown.
MOST_STRIPS = 24
# Most points in all strips together, and the fewest and most in one strip.
ALL_POINTS, FEWEST_POINTS, MOST_POINTS = 20_000, 100, 1200
# Colour and marker of each verdict.
VERDICTS = {
    compare.FASTER: ("s1", "<"),
    compare.SLOWER: ("s2", ">"),
    compare.SAME: (DARK, "s"),
    compare.UNDECIDED: (GREY, "o"),
}


def further_timings(context: Context) -> list[Panel]:
    """Return, for every file with further timings, how they relate to the headline."""
    timed = [entry for entry in context.entries if entry.case.timings]
    groups = grouped(timed, lambda entry: entry.file.key)
    return [_timings(context, f"timings-{place}", members) for place, members in enumerate(groups.values())]


def _timings(context: Context, slug: str, entries: list[ReportEntry]) -> Panel:
    file = entries[0].file
    title = f"Other ways of timing{': ' * bool(file.key)}{file.title if file.key else ''}"
    looks = Palette(timing_name(timing) for entry in entries for timing in entry.case.timings)
    rows = [entry for entry in entries if _timed(entry)]
    drawn = rows[:ALL_ROWS]
    pictures = []
    every = [[_dot(timing, entry, looks) for timing in _timed(entry)] for entry in drawn]
    for place, (part, dots) in enumerate(zip(chunks(drawn), chunks(every), strict=True)):
        names = [case_name(entry.case) for entry in part]
        told = [[(timing_name(one), _multiple(one, entry)) for one in _timed(entry)] for entry in part]
        caption = Caption(
            numbered(f"{slug}-chart", place),
            f"{title}, as multiples of the headline",
            findings.of_multiples(names, told),
        )
        svg = line_charts.relative(caption, names, dots, "time, as a multiple of the headline", every)
        pictures.append(Picture(file_name(f"timings {file.key}"), caption, svg))
    kinds = dict.fromkeys(timing_name(timing) for entry in drawn for timing in _timed(entry))
    legend = [Swatch(kind, looks[kind], looks.marker(kind)) for kind in kinds]
    notes = [*cut_note(drawn, rows), *_timing_notes(entries)]
    table = tables.timings(entries)
    return Panel(slug, title, context.subject(entries), pictures, legend, notes, [table], is_short(table))


def _multiple(timing: Timing, entry: ReportEntry) -> float:
    assert timing.latency_ms is not None
    assert entry.case.latency_ms is not None
    return timing.latency_ms.median / entry.case.latency_ms.median


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
    drawn = rows[:ALL_ROWS]
    pictures = []
    every = [[Relative(_ratio(case), *VERDICTS[case.verdict])] for case in drawn]
    for place, (part, dots) in enumerate(zip(chunks(drawn), chunks(every), strict=True)):
        caption = Caption(
            numbered(f"{slug}-chart", place), f"Time ratio: {title}", findings.of_comparison(part)
        )
        names = [f"{case_name(case)}: {case.verdict}" for case in part]
        svg = line_charts.relative(
            caption, names, dots, "time ratio: left of 1 is faster than the base", every
        )
        pictures.append(Picture(file_name(slug), caption, svg))
    notes = [f"Warning: {warning}." for warning in warnings] + cut_note(drawn, rows)
    notes += ["Nothing can be compared: the table says why."] * (not rows)
    table = tables.comparison(cases)
    return Panel(slug, title, "", pictures, [], notes, [table], is_short(table))


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
    title = f"{scenario}{': ' * bool(file.key)}{file.title if file.key else ''}"
    look = Look(context.colours, Palette(()))
    pictures = []
    for place, part in enumerate(chunks(members)):
        caption = Caption(
            numbered(f"{slug}-chart", place),
            f"Every sample: {title}",
            findings.of_samples(part),
        )
        svg = line_charts.samples(caption, part, most, look)
        pictures.append(Picture(file_name(f"{scenario} samples {file.key}"), caption, svg))
    longest = max(len(entry.case.latency_ms.samples) for entry in members if entry.case.latency_ms)
    thinned = f"Of up to {longest} samples, at most {most} are drawn: the extremes of equal intervals."
    notes = [thinned] * (longest > most)
    return Panel(slug, title, context.subject(members), pictures, [], notes, [tables.pass_table(members)])
