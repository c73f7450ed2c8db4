"""Pictures of how times relate: other ways of timing, other files, one forward after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mla.bench.report import charts as plots
from mla.bench.report import tables
from mla.bench.report.charts import Relative
from mla.bench.report.panel import MOST_ROWS, Context, Picture, case_name, cut_note, file_title, is_short
from mla.bench.report.series import (
    Entry,
    Measure,
    Source,
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

#: Strips of samples of one file: the widest spreads are shown.
MOST_STRIPS = 24
#: Points of all strips together, and of one strip at least and at most.
ALL_POINTS, FEWEST_POINTS, MOST_POINTS = 20_000, 100, 1200
#: Colour and marker of a verdict.
VERDICTS = {
    compare.FASTER: ("#0072B2", "<"),
    compare.SLOWER: ("#D55E00", ">"),
    compare.SAME: (DARK, "s"),
    compare.UNDECIDED: (GREY, "o"),
}


def further_timings(context: Context) -> list[Picture]:
    """Return, for every file that has some, other ways of timing beside the headline."""
    found = [entry for entry in context.entries if entry.case.timings]
    groups = grouped(found, lambda entry: entry.source.path + entry.source.key)
    return [_timings(f"timings-{place}", members) for place, members in enumerate(groups.values())]


def _timings(slug: str, found: list[Entry]) -> Picture:
    title = file_title(found[0].source)
    looks = Palette(timing_name(one) for entry in found for one in entry.case.timings)
    rows = [entry for entry in found if _timed(entry)]
    drawn = rows[:MOST_ROWS]
    dots = [[_dot(one, entry, looks) for one in _timed(entry)] for entry in drawn]
    ways = dict.fromkeys(timing_name(one) for entry in drawn for one in _timed(entry))
    legend = [Swatch(way, looks[way], looks.marker(way)) for way in ways]
    label = "time, as a multiple of the headline"
    names = [case_name(entry.case) for entry in drawn]
    drawings = [plots.relative(slug, f"{title}: {label}", names, dots, label)] if drawn else []
    notes = [*cut_note(drawn, rows), *_timing_notes(found)]
    table = tables.timings(found)
    return Picture(slug, title, drawings, legend, notes, [table], is_short(table))


def _timed(entry: Entry) -> list[Timing]:
    """Return the further timings that can be set against the case's headline."""
    return [one for one in entry.case.timings if one.latency_ms and entry.case.latency_ms]


def _timing_notes(found: Sequence[Entry]) -> Iterator[str]:
    """Say which cases wait for the host, and why timings have no number, every reason once."""
    bound = [case_name(entry.case) for entry in found if entry.case.launch_bound]
    if bound:
        yield f"Launch bound (the host is slower than the device): {'; '.join(bound)}."
    missing = [one for entry in found for one in entry.case.timings if one.latency_ms is None]
    groups = grouped(missing, lambda one: (timing_name(one), one.check.status, one.check.reason))
    for (name, status, reason), same in groups.items():
        yield f"{name}: {status} in {len(same)} of {len(found)} cases{': ' * bool(reason)}{reason}."


def _dot(one: Timing, entry: Entry, looks: Palette) -> Relative:
    assert one.latency_ms is not None
    assert entry.case.latency_ms is not None
    way = timing_name(one)
    return Relative(_over(one.latency_ms, entry.case.latency_ms.median), looks[way], looks.marker(way))


def _over(latency: Latency, unit: float) -> Measure:
    low, high = latency.ci95 or (None, None)
    return Measure(latency.median / unit, low and low / unit, high and high / unit)


def against_base(context: Context) -> list[Picture]:
    """Return the comparison of every further file with the first."""
    base = file_title(context.files[0])
    return [
        _comparison(f"compare-{place}", f"{file_title(source)} against {base}", found, remarks)
        for place, (source, found, remarks) in enumerate(comparisons(context.files))
    ]


def _comparison(
    slug: str, title: str, found: Sequence[compare.Comparison], remarks: Sequence[str]
) -> Picture:
    rows = [one for one in found if one.ratio is not None]
    drawn = rows[:MOST_ROWS]
    dots = [[Relative(_ratio(one), *VERDICTS[one.verdict])] for one in drawn]
    label = "time ratio: left of 1 is faster than the base"
    names = [case_name(one) for one in drawn]
    drawings = [plots.relative(slug, title, names, dots, label)] if drawn else []
    met = {one.verdict for one in drawn}
    legend = [Swatch(name, *look) for name, look in VERDICTS.items() if name in met]
    notes = [f"Warning: {remark}." for remark in remarks] + cut_note(drawn, rows)
    notes += ["Nothing can be compared: the table says why."] * (not rows)
    table = tables.comparison(found)
    return Picture(slug, title, drawings, legend, notes, [table], is_short(table))


def _ratio(one: compare.Comparison) -> Measure:
    assert one.ratio is not None
    return Measure(one.ratio, *(one.interval or (None, None)))


def distributions(context: Context) -> list[Picture]:
    """Return the samples of every file's cases; where there are many, of those with the widest spread."""
    kept = [entry for source in context.files for entry in _widest(source)]
    most = max(FEWEST_POINTS, min(MOST_POINTS, ALL_POINTS // max(1, len(kept))))
    groups = grouped(kept, lambda entry: (entry.source.key, entry.case.scenario))
    return [
        _samples(context, f"samples-{place}", members, most) for place, members in enumerate(groups.values())
    ]


def _widest(source: Source) -> Iterator[Entry]:
    found = with_numbers(entries([source]))
    chosen = sorted(range(len(found)), key=lambda place: -spread(found[place]))[:MOST_STRIPS]
    return (found[place] for place in sorted(chosen))


def _samples(context: Context, slug: str, found: list[Entry], most: int) -> Picture:
    source, scenario = found[0].source, found[0].case.scenario
    title = f"{file_title(source)}: {scenario}"
    look = Look(context.colours, Palette(()))
    drawing = plots.samples(slug, f"samples of {title}", found, most, look)
    longest = max(len(entry.case.latency_ms.samples) for entry in found if entry.case.latency_ms)
    thinned = f"Of up to {longest} samples, at most {most} are drawn: the extremes of equal stretches."
    notes = [thinned] * (longest > most)
    return Picture(slug, title, [drawing], [], notes, [tables.pass_table(found)])
