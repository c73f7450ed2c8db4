"""What charts and tables show: selected from runs, without drawing anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from mla.bench import results
from mla.bench.report import charts, figures, summary
from mla.bench.report.summary import ResultFile

Case = Callable[..., results.Case]


@pytest.fixture
def source(make_run: Any) -> Callable[..., ResultFile]:
    """Return a maker of a file with the given cases."""

    def source(*cases: results.Case, **changes: Any) -> ResultFile:
        run = make_run()
        run.cases = list(cases)
        for name, value in changes.items():
            setattr(run, name, value)
        return summary.result_files(["run.json"], [run])[0]

    return source


def point(case: Case, implementation: str = "mla", **values: Any) -> results.Case:
    return case(scenario=f"sweep {values}", base="sweep", implementation=implementation, point=values)


def places(entries: Sequence[charts.Entry], axis: str = "kv") -> list[tuple[str, list[float]]]:
    """Return name and places of every curve."""
    lines = [line for group in charts.curves(entries, axis).values() for line in group]
    return [(line.name, [x for x, _ in line.points]) for line in lines]


def test_several_files_get_letters_and_short_names(make_run: Any) -> None:
    runs = [make_run() for _ in range(3)]
    runs[0].config = {"name": "folder/tiny.json"}
    runs[2].config = {"name": "/models/other/config.json"}
    loaded = summary.result_files(["/r/old/run.json", "/r/new/run.json", "/r/x\x1b.json"], runs)
    assert [file.title for file in loaded] == ["A old/run.json", "B new/run.json", "C r/x\\x1b.json"]
    assert [file.config for file in loaded] == ["tiny", "", "other"]
    assert summary.result_files(["x"], runs[:1])[0].key == ""
    assert [file.key for file in summary.result_files(["x"] * 28, [make_run()] * 28)][25:] == [
        "Z",
        "A1",
        "B1",
    ]


def test_a_curve_has_one_implementation_and_one_value_of_every_other_axis(source: Any, case: Case) -> None:
    cases = [
        point(case, name, kv=kv, batch=batch)
        for kv in (64, 16, 32)
        for batch in (1, 8)
        for name in ("mla", "other")
    ]
    entries = charts.entries([source(*cases)])
    assert places(entries) == [
        ("mla, batch 1", [16, 32, 64]),
        ("other, batch 1", [16, 32, 64]),
        ("mla, batch 8", [16, 32, 64]),
        ("other, batch 8", [16, 32, 64]),
    ]
    assert len(places(entries, "batch")) == 6
    assert charts.bars(entries) == {}


def test_files_have_curves_of_their_own(make_run: Any, case: Case) -> None:
    runs = [make_run(), make_run()]
    for run in runs:
        run.cases = [point(case, kv=kv) for kv in (1, 2)]
    entries = charts.entries(summary.result_files(["x", "x"], runs))
    assert places(entries) == [("A mla", [1, 2]), ("B mla", [1, 2])]


@pytest.mark.parametrize("values", [[{"kv": 5}, {"kv": 5}], [{"kv": "1..5"}, {"kv": "2..6"}], [{"heads": 8}]])
def test_what_makes_no_curve_is_a_bar(source: Any, case: Case, values: list[dict[str, Any]]) -> None:
    entries = charts.entries([source(*(point(case, **each) for each in values))])
    assert places(entries) == []
    assert [len(group) for group in charts.bars(entries).values()] == [len(values)]


def test_yardsticks_are_in_no_chart(source: Any, case: Case) -> None:
    yardstick = {"implementation": "read", "check": results.Check(status="not run", reason="only reads")}
    points = [point(case, kv=kv) for kv in (1, 2)]
    entries = charts.entries([source(case(), case(**yardstick), *points, case(base="sweep", **yardstick))])
    assert len(entries) == 3
    assert places(entries) == [("mla", [1, 2])]


def test_charts_hold_one_workload_and_say_what_tells_them_apart(make_run: Any, case: Case) -> None:
    runs = [make_run(), make_run()]
    for run, name in zip(runs, ("small", "large"), strict=True):
        run.config = {"name": name}
        run.cases = [case(), case(scenario="decode", base="decode", op="latent_attention")]
    groups = charts.bars(charts.entries(summary.result_files(["x", "y"], runs)))
    assert list(charts.titles(groups).values()) == [
        "prefill, small",
        "decode, latent_attention, small",
        "prefill, large",
        "decode, latent_attention, large",
    ]
    assert list(charts.titles(list(groups)[:1]).values()) == ["prefill"]


def test_the_highest_and_the_lowest_limits_are_the_roofs(source: Any, case: Case) -> None:
    def ceiling(work: Any, value: float, **more: Any) -> results.Ceiling:
        return results.Ceiling(work=work, value=value, source="here", **more)

    limits = [
        *(ceiling("read", value) for value in (2e9, 5e9, 1e9)),
        ceiling("copy", 9e9),
        *(ceiling("matmul", value, dtype="bfloat16") for value in (1e12, 2e12)),
    ]
    assert [roof.value for roof in charts.roofs_of(source(case(), ceilings=limits))] == [5e9, 1e9, 2e12]
    assert charts.roofs_of(source(case())) == []


def test_colours_of_known_implementations_are_the_same_in_all_reports_and_no_two_are_equal() -> None:
    names = [*figures.KNOWN, "a", "b", "c", "d", "e"]
    by_name = figures.colours(names)
    assert len(set(by_name.values())) == len(names)
    assert figures.colours(["z", "transformers"])["transformers"] == by_name["transformers"]
