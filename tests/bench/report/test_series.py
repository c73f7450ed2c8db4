"""What the report's pictures show: selected from runs, without drawing anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from mla.bench import results
from mla.bench.report import doubts, roofline_data, series, summary
from mla.bench.report.series import ReportEntry, ResultFile
from mla.bench.results.schema import NewLengths

Case = Callable[..., results.Case]


@pytest.fixture
def source(make_run: Any) -> Callable[..., ResultFile]:
    """Return a maker of a file with the given cases."""

    def source(*cases: results.Case, **changes: Any) -> ResultFile:
        run = make_run()
        run.cases = list(cases)
        for name, value in changes.items():
            setattr(run, name, value)
        return series.result_files(["run.json"], [run])[0]

    return source


def point(case: Case, implementation: str = "mla", **values: Any) -> results.Case:
    return case(scenario=f"sweep {values}", base="sweep", implementation=implementation, point=values)


def places(found: Sequence[series.Curves]) -> list[tuple[str, str, list[float]]]:
    """Return implementation, other values and places of every line."""
    return [
        (line.entry.case.implementation, line.others, [x for x, _ in line.points])
        for one in found
        for line in one.lines
    ]


def test_several_files_get_letters_and_short_names(make_run: Any) -> None:
    runs = [make_run() for _ in range(3)]
    runs[0].config = {"name": "/home/somebody/tiny.json"}
    runs[2].config = {"name": "other"}
    found = series.result_files(["/r/old/run.json", "/r/new/run.json", "/r/x.json"], runs)
    assert [one.key for one in found] == ["A", "B", "C"]
    assert [one.title for one in found] == ["A old/run.json", "B new/run.json", "C x.json"]
    assert [one.config for one in found] == ["tiny", "", "other"]
    assert series.result_files(["x"], runs[:1])[0].key == ""
    assert [one.key for one in series.result_files(["x"] * 28, [make_run()] * 28)][25:] == ["Z", "AA", "AB"]


def test_a_line_has_one_implementation_and_one_value_of_every_other_axis(source: Any, case: Case) -> None:
    cases = [
        point(case, name, kv=kv, batch=batch)
        for kv in (64, 16, 32)
        for batch in (1, 8)
        for name in ("mla", "other")
    ]
    found = series.entries([source(*cases)])
    assert places(series.curves(found, "kv")) == [
        ("mla", "batch 1", [16, 32, 64]),
        ("other", "batch 1", [16, 32, 64]),
        ("mla", "batch 8", [16, 32, 64]),
        ("other", "batch 8", [16, 32, 64]),
    ]
    assert len(places(series.curves(found, "batch"))) == 6
    assert series.bars(found) == {}


def test_files_have_lines_of_their_own(make_run: Any, case: Case) -> None:
    runs = [make_run(), make_run()]
    for run in runs:
        run.cases = [point(case, kv=kv) for kv in (1, 2)]
    (found,) = series.curves(series.entries(series.result_files(["x", "x"], runs)), "kv")
    assert [line.entry.file.key for line in found.lines] == ["A", "B"]


def test_a_wrong_case_is_on_no_picture(source: Any, case: Case) -> None:
    wrong = point(case, kv=4)
    wrong.latency_ms = wrong.tokens_per_s = None
    found = series.entries([source(point(case, kv=1), point(case, kv=2), wrong)])
    assert places(series.curves(found, "kv")) == [("mla", "", [1, 2])]
    assert series.bars(found) == {}
    assert roofline_data.roofline(found[0].file).dots[2:] == []


@pytest.mark.parametrize("values", [[{"kv": 5}, {"kv": 5}], [{"kv": "1..5"}, {"kv": "2..6"}], [{"heads": 8}]])
def test_what_makes_no_curve_is_a_bar(source: Any, case: Case, values: list[dict[str, Any]]) -> None:
    found = series.entries([source(*(point(case, **one) for one in values))])
    assert series.curves(found, "kv") == []
    assert [len(group) for group in series.bars(found).values()] == [len(values)]


def test_pictures_hold_one_workload_and_say_what_tells_them_apart(make_run: Any, case: Case) -> None:
    runs = [make_run(), make_run()]
    for run, name in zip(runs, ("small", "large"), strict=True):
        run.config = {"name": name}
        run.cases = [case(), case(scenario="decode", base="decode", op="latent_attention")]
    found = series.entries(series.result_files(["x", "y"], runs))
    groups = series.bars(found)
    names = series.titles(groups)
    assert [names[one] for one in groups] == [
        "prefill, small",
        "decode, latent_attention, small",
        "prefill, large",
        "decode, latent_attention, large",
    ]
    assert series.titles([series.workload(found[0])]) == {series.workload(found[0]): "prefill"}


def test_thinning_keeps_the_extremes_in_order() -> None:
    samples = [1.0 + 0.001 * (i % 7) for i in range(1200)]
    samples[333], samples[777] = 90.0, 0.1
    found = series.thin(samples, 200)
    assert len(found) <= 200
    assert {(333, 90.0), (777, 0.1)} <= set(found)
    assert [index for index, _ in found] == sorted({index for index, _ in found})
    assert series.thin(samples, 1200) == list(enumerate(samples))


def test_ceilings_are_the_roofs(source: Any, case: Case) -> None:
    def ceiling(work: Any, value: float, **more: Any) -> results.Ceiling:
        return results.Ceiling(work=work, value=value, source="here", **more)

    limits = [
        ceiling("read", 1e9, footprint_bytes=3 << 29),
        ceiling("read", 5e9, footprint_bytes=32 << 20),
        ceiling("read", 0.99e9),  # too near the first to be a line of its own
        ceiling("copy", 9e9),
        ceiling("matmul", 1e12, dtype="bfloat16"),
        ceiling("matmul", 0.97e12, dtype="float32"),  # as near, but another limit: its name stays
    ]
    found = roofline_data.roofline(source(case(roofline=floor(7.0, "memory")), ceilings=limits))
    kept = [(one.bound, one.value, one.detail) for one in found.drawn]
    assert kept == [
        ("memory", 5e9, "32 MiB"),
        ("memory", 1e9, "1.5 GiB"),
        ("compute", 1e12, "bfloat16, float32"),
    ]
    assert sorted(one.value for one in found.roofs) == sorted(
        one.value for one in limits if one.work != "copy"
    )
    assert roofline_data.ridge(found.roofs) == pytest.approx(200)


def floor(ms: float, bound: Any) -> results.Roofline:
    return results.Roofline(floor_ms=ms, fraction=0.5, bound=bound, peak_source="there")


def test_without_ceilings_roofs_are_what_the_floors_were_computed_from(source: Any, case: Case) -> None:
    cost = results.Cost(flops=4 * 10**9, bytes=10**6)
    one = source(
        case(cost=cost, roofline=floor(0.5, "memory")), case(cost=cost, roofline=floor(4, "compute"))
    )
    found = roofline_data.roofline(one)
    assert [(one.bound, one.value, one.source) for one in found.roofs] == [
        ("memory", pytest.approx(2e9), "there"),
        ("compute", pytest.approx(1e12), "there"),
    ]
    assert [(dot.intensity, dot.rate) for dot in found.dots] == [(4000, 2e12)] * 2  # in 2 ms
    assert roofline_data.roofline(source(case())).roofs == []
    assert roofline_data.ridge(roofline_data.roofline(source(case())).roofs) is None


def test_a_case_without_work_is_under_no_roof(source: Any, case: Case) -> None:
    assert roofline_data.roofline(source(case(cost=results.Cost(flops=0, bytes=0)))).dots == []


def with_status(case: Case, status: Any, **changes: Any) -> results.Case:
    return case(check=results.Check(status=status, reason="because"), latency_ms=None, **changes)


def said(cases: Sequence[results.Case]) -> list[tuple[str, str]]:
    return [(one.status, one.text) for one in doubts.badges(cases)]


def test_badges_count_cases_the_worst_first(case: Case) -> None:
    doubt = case(roofline=results.Roofline(doubt="faster than its floor"))
    cases = [case(), with_status(case, "not run"), with_status(case, "doubtful"), with_status(case, "wrong")]
    assert said([*cases, doubt, case(interrupted=True)]) == [
        ("wrong", "1 of 6 cases wrong"),
        ("doubtful", "1 of 6 cases doubtful: no number"),
        ("in-doubt", "1 of 6 cases with limit or time in doubt"),
        ("not-run", "1 of 6 cases not run"),
        ("interrupted", "1 of 6 cases interrupted"),
    ]
    assert said([case(latency_ms=None), case()]) == [("not-timed", "1 of 2 cases not timed")]
    assert said([case(), case()]) == [("ok", "all 2 cases agree with the oracle")]
    assert said([]) == [("not-run", "no case was run")]


@pytest.mark.parametrize(
    "changes",
    [
        {"check": results.Check(status="doubtful"), "latency_ms": None},
        {"roofline": results.Roofline(doubt="faster than its floor")},
        {"interrupted": True},
        {"check": results.Check(status="not run"), "latency_ms": None},
    ],
)
def test_nothing_in_doubt_is_green(case: Case, changes: dict[str, Any]) -> None:
    assert "ok" not in [status for status, _ in said([case(), case(**changes), case()])]


def test_a_yardstick_is_not_a_case_that_failed(case: Case) -> None:
    yardstick = case(implementation="read", check=results.Check(status="not run", reason="only reads"))
    assert said([case(), yardstick]) == [
        ("ok", "the only case agrees with the oracle"),
        ("yardstick", "and 1 yardstick, where nothing is computed"),
    ]


def test_the_cases_in_doubt_are_named_with_reasons_up_to_a_few(case: Case) -> None:
    cases = [with_status(case, "doubtful", scenario=f"s{place}") for place in range(9)]
    found = doubts.named([case(), *cases, with_status(case, "wrong", scenario="bad")])
    assert [one.text for one in found] == [
        "bad, mla: wrong: because",
        *(f"s{place}, mla: doubtful: because" for place in range(3)),
        "and 6 more in the table",
    ]


def test_remarks_are_counted_in_cases(source: Any, case: Case) -> None:
    loud = case(settled=False)
    assert loud.latency_ms is not None
    loud.latency_ms = results.Latency(
        median=1.0, ci95=None, p10=1, p90=9, samples=[1.0] * 9 + [99.0], drift=0.5, outliers=4
    )
    text = doubts.counted_remarks(source(loud, case(latency_ms=None), loud).run)
    assert text.startswith("2 of 3 cases ")
    parts = text.replace(" of 3 cases", "").split(", ")
    assert sorted(parts) == ["2 drifting", "2 noisy", "2 not settled", "2 with outliers"]
    assert doubts.counted_remarks(source().run) == ""


def test_slow_new_lengths_are_counted(source: Any, case: Case) -> None:
    def lengths(ms: float) -> results.Case:
        found = NewLengths(forwards=9, ms=ms, repeated_ms=2.0, plan_ms=0.1, repeated_plan_ms=0.1)
        one = case(new_lengths=found)
        assert one.latency_ms is not None
        one.latency_ms.p10 = one.latency_ms.p90 = one.latency_ms.median  # no noise hides the gap
        one.latency_ms.drift = None
        return one

    assert doubts.counted_remarks(source(lengths(2.1), lengths(9.0), lengths(2.0)).run) == (
        "1 of 3 cases slower on new lengths"
    )


def test_limits_that_moved_or_judge_themselves_are_in_doubt() -> None:
    def ceiling(value: float, lowest: float | None, **more: Any) -> results.Ceiling:
        return results.Ceiling(work="read", value=value, lowest=lowest, source="here", **more)

    assert list(doubts.of_limits([ceiling(1e11, 0.95e11), ceiling(1e11, None)])) == []
    assert list(doubts.of_limits([ceiling(1e11, 0.95e11), ceiling(1e11, 0.5e11, ours=True)])) == [
        "The limit of reading was measured as 50 to 100.0 GB/s; the highest counts.",
        "The limit of reading is what our own op reached: nothing from outside judges it.",
    ]


def test_a_summary_leads_with_the_scenarios_and_counts_the_grid(source: Any, case: Case) -> None:
    found = summary.summary(source(*(point(case, kv=kv) for kv in (1, 2, 3)), case(), git_commit="a" * 40))
    assert found.headlines == [summary.Headline("ok", "Prefill Latency", "2 ms")]
    assert found.more == "and 3 grid cases in the table"
    assert ("commit", "a" * 12) in found.facts
    assert [one.where for one in found.verdicts] == ["sweep (3 points)", "prefill"]


def test_a_large_grid_alone_has_its_verdict_and_no_headlines(source: Any, case: Case) -> None:
    found = summary.summary(source(*(point(case, kv=kv) for kv in range(50))))
    assert (found.headlines, found.more) == ([], "50 grid cases in the table")
    assert [str(one) for one in found.verdicts] == ["sweep (50 points): only mla has numbers"]


def test_yardsticks_are_on_no_picture(source: Any, case: Case) -> None:
    yardstick = {"implementation": "read", "check": results.Check(status="not run", reason="only reads")}
    found = [case(), case(**yardstick), *(point(case, kv=kv) for kv in (1, 2))]
    found += [case(scenario=f"s{kv}", base="sweep", point={"kv": kv}, **yardstick) for kv in (1, 2)]
    entries = series.entries([source(*found)])
    assert places(series.curves(entries, "kv")) == [("mla", "", [1, 2])]
    assert [len(group) for group in series.bars(entries).values()] == [1]
    assert len(roofline_data.roofline(entries[0].file).dots) == 3


def test_lines_of_files_differ_in_shape_and_not_in_colour(make_run: Any, case: Case) -> None:
    runs = [make_run(), make_run()]
    for run in runs:
        run.cases = [point(case, kv=kv) for kv in (1, 2)]
    (found,) = series.curves(series.entries(series.result_files(["x", "y"], runs)), "kv")
    assert [line.shape for line in found.lines] == ["A x", "B y"]


def test_lengths_are_folded(case: Case) -> None:
    rows = dict(summary.method(case(query_lens=[1, 1, 1, 2], history=[0, 5, 5, 0])))
    assert rows["requests"] == "4; new tokens 1 x3, 2; history 0, 5 x2, 0"


def test_names_are_cut_and_cleaned() -> None:
    assert series.printable("a\x00b\n\ud800c") == "a b c"
    assert series.printable("abcdef", 4) == "abc…"


def test_a_name_in_a_picture_starts_with_its_file(source: Any, case: Case) -> None:
    assert ReportEntry(source(case()), case()).name == "mla"
    assert ReportEntry(ResultFile("B", "x", source(case()).run), case()).name == "B mla"
