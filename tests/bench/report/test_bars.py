"""Bars end in their values, limits stand where they hold, words repeat the verdict, parts share one scale."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from matplotlib.figure import Figure

from mla.bench import results
from mla.bench.report import findings, panel, series, timing_panels
from mla.bench.report.draw import bar_charts, chart_axes
from mla.bench.report.draw.labels import Box, around, clear
from mla.bench.report.draw.svg import Caption
from mla.bench.report.series import LATENCY, Measure


@pytest.mark.parametrize("break_off", [True, False])
@pytest.mark.parametrize(
    ("measures", "broken", "drawn_to"),
    [
        ([Measure(1, 0.9, 1.1), Measure(45, 40, 50), Measure(149, 142, 1296)], [], 149),  # a whisker alone
        ([Measure(1, 0.9, 1.1), Measure(4, 3, 5), Measure(45, 40, 50)], [45], 4),
        ([Measure(5, None, None), Measure(6, 5, 9)], [], 9),
    ],
)
def test_a_bar_is_broken_off_for_its_value_alone(
    measures: Sequence[Measure], broken: list[float], drawn_to: float, break_off: bool
) -> None:
    whole = chart_axes.bar_scale(Figure().add_subplot(), measures, [], break_off=break_off)
    assert [one.value for one in measures if chart_axes.is_broken(one, whole)] == broken * break_off
    drawn = [chart_axes.within(one, whole) for one in measures]
    assert all(max(one.value, one.high or 0) <= whole for one in drawn)
    if break_off:
        assert drawn_to <= whole < 2 * drawn_to


def said(entries: Sequence[series.ReportEntry]) -> tuple[list[str], str]:
    """Return the texts of a bar chart, and its description."""
    context = panel.Context([entry.file for entry in entries])
    names = panel.row_names(entries)
    found = findings.of_bars(entries, names, LATENCY)
    svg = bar_charts.bars(Caption("slug", "title", found), names, entries, LATENCY, context.colours)
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg), found


def cases(make_run: Any, case: Any, *files: dict[str, Any]) -> list[series.ReportEntry]:
    """Return the cases of files: median, floor and interval by implementation."""
    runs = []
    for file in files:
        run = make_run()
        run.cases = []
        for name, (median, floor, bounds) in file.items():
            limit = results.Roofline(floor_ms=floor, bound="memory")
            one = case(implementation=name, roofline=limit, ops={"linear": name})
            assert one.latency_ms is not None
            one.latency_ms.median, one.latency_ms.ci95 = median, bounds
            run.cases.append(one)
        runs.append(run)
    return series.entries(series.result_files([f"{place}.json" for place in range(len(runs))], runs))


def test_a_limit_crosses_only_the_bars_that_it_holds_for(make_run: Any, case: Any) -> None:
    mine = {"a": (4.0, 2.0, None), "b": (5.0, 2.0, None)}
    texts, found = said(cases(make_run, case, mine))
    assert "limit 2 ms" in texts
    assert "The limit is 2 ms." in found
    for theirs in ({"a": (9.0, None, None)}, {"a": (9.0, 3.0, None)}):  # a device without one, or another
        texts, found = said(cases(make_run, case, mine, theirs))
        assert not [text for text in texts if text.startswith("limit")]
        assert "The limit is" not in found
        assert "A a 4 ms (limit 2)" in found


def test_words_name_no_winner_that_the_verdict_does_not(make_run: Any, case: Any) -> None:
    apart, overlap = (4.9, 5.1), (3.9, 5.1)
    _, found = said(cases(make_run, case, {"a": (4.0, None, (3.9, 4.1)), "b": (5.0, None, apart)}))
    assert found.startswith("a won, 1.25x as fast as b (")
    _, found = said(cases(make_run, case, {"a": (4.0, None, (3.9, 4.1)), "b": (5.0, None, overlap)}))
    assert found.startswith("no decision between a and b: ")
    assert "won" not in found


def test_only_bars_are_counted_as_bars_and_the_limit_is_always_told(make_run: Any, case: Any) -> None:
    entries = cases(make_run, case, {f"i{place}": (4.0 + place, 2.0, None) for place in range(9)})
    entries[8].case.latency_ms, entries[8].case.check = None, results.Check(status="wrong", reason="off")
    _, found = said(entries)
    assert "The limit is 2 ms. i8 has no number: wrong. i0 4 ms;" in found
    assert found.endswith("; and 2 more bars.")


def test_a_label_is_refused_where_something_else_is_nearer() -> None:
    own, other = [around((0, 0), 0)], [around((30, 0), 0)]
    near, far = Box(5, -4, 15, 4), Box(20, -4, 28, 4)
    assert list(clear([far, near], own, other)) == [near]
    assert list(clear([near], own, other, by=20)) == []


def test_parts_of_a_comparison_have_one_scale(make_run: Any, case: Any) -> None:
    runs = [make_run(), make_run()]
    for run, factor in zip(runs, (1.0, 0.9), strict=True):
        run.cases = [case(scenario=f"s{place}", base=f"s{place}") for place in range(20)]
        for place, one in enumerate(run.cases):
            one.latency_ms.samples = [(place + 1) * factor**place * s for s in one.latency_ms.samples]
            one.latency_ms.median *= (place + 1) * factor**place
    (found,) = timing_panels.against_base(panel.Context(series.result_files(["a", "b"], runs)))
    ticks = [re.findall(r">(\d*\.?\d+[kMG]?)</text>", one.svg) for one in found.drawings]
    assert len(ticks) == 2
    assert ticks[0] == ticks[1] != []
