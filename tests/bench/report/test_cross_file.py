"""Who won between files, in a sentence for each scenario."""

from __future__ import annotations

from typing import Any

import pytest

from mla.bench import results
from mla.bench.report import cross_file, series
from mla.bench.results.compare import SLOWER, Comparison


@pytest.fixture
def against(make_run: Any) -> Any:
    """Return the verdicts about a run with the given statuses or medians, against one of 2 ms."""

    def run(times: dict[str, float | str]) -> results.Run:
        made = make_run()
        made.cases = []
        for name, time in times.items():
            one = make_run(implementation=name).cases[0]
            if isinstance(time, str):
                one.check, one.latency_ms = results.Check(status=time), None  # type: ignore[arg-type]
            else:
                samples = [time * (0.99 + 0.004 * place) for place in range(6)]
                ends = (samples[0], samples[-1])
                one.latency_ms = results.Latency(median=time, ci95=ends, p10=time, p90=time, samples=samples)
                one.tokens_per_s = results.Throughput(median=8e3 / time, ci95=(8e3 / ends[1], 8e3 / ends[0]))
                one.passes = 6
            made.cases.append(one)
        return made

    def against(base: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, str]]:
        files = series.result_files(["/x/old.json", "/x/new.json"], [run(base), run(new)])
        return [(one.outcome, str(one)) for one in cross_file.verdicts(files)]

    return against


@pytest.mark.parametrize(
    ("ms", "outcome", "text"),
    [
        (1.0, "won", "prefill, mla: B new.json won, 2.00x as fast as A old.json (1.96 .. 2.04)"),
        (4.0, "won", "prefill, mla: A old.json won, 2.00x as fast as B new.json (1.96 .. 2.04)"),
        (
            2.04,
            "open",
            "prefill, mla: no decision between A old.json and B new.json: 1.02x as fast (1.00 .. 1.04)",
        ),
    ],
)
def test_the_faster_file_wins_or_nobody(against: Any, ms: float, outcome: str, text: str) -> None:
    ((found, said),) = against({"mla": 2.0}, {"mla": ms})
    assert found == outcome
    assert said.startswith(text)


def test_a_case_that_lost_its_number_is_said_before_the_next_that_has_one(against: Any) -> None:
    first, second = against({"mla": 2.0, "b": 2.0}, {"mla": "doubtful", "b": 1.0})
    assert first[0] == "none"
    assert "prefill, mla: B new.json and A old.json cannot be compared" in first[1]
    assert "doubtful" in first[1]
    assert "prefill, b: B new.json won" in second[1]


def test_files_with_nothing_in_common_say_so(against: Any) -> None:
    ((outcome, text),) = against({"mla": 2.0}, {"b": 2.0})
    assert outcome == "open"
    assert text.startswith("B new.json against A old.json: cannot be compared: ")


def test_many_scenarios_are_counted(make_run: Any, case: Any) -> None:
    runs = [make_run(), make_run()]
    for run in runs:
        run.cases = [case(scenario=f"s{place}", base=f"s{place}") for place in range(9)]
    (found,) = cross_file.verdicts(series.result_files(["x", "y"], runs))
    assert str(found) == "9 cases, B y against A x: no decision in 9"


def test_long_names_are_not_repeated_in_every_sentence(make_run: Any) -> None:
    files = series.result_files([f"{place}{'x' * 30}.json" for place in "ab"], [make_run(), make_run()])
    (found,) = cross_file.verdicts(files)
    assert str(found).startswith("prefill, mla: no decision between B and A: ")


def test_a_scenario_that_only_one_file_has_is_one_sentence(against: Any, make_run: Any, case: Any) -> None:
    runs = [make_run(), make_run()]
    runs[1].cases += [case(scenario="decode", base="decode", implementation=name) for name in ("mla", "b")]
    found = cross_file.verdicts(series.result_files(["x", "y"], runs))
    assert [one.where for one in found] == ["prefill, mla", "decode, mla"]


def test_a_slower_verdict_is_never_a_win_of_the_new_file(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "whole passes take 1.1 to 1.2 times as long"
    (case,) = make_run().cases
    found = Comparison(case, case, 0.99, (0.98, 1.0), SLOWER, reason=why)
    monkeypatch.setattr(cross_file, "comparisons", lambda files: [(files[1], [found], [])])
    (verdict,) = cross_file.verdicts(series.result_files(["x", "y"], [make_run(), make_run()]))
    assert verdict.text == f"A x won: {why}"


def test_what_a_file_lacks_is_one_line_and_no_loss(make_run: Any, case: Any) -> None:
    runs = [make_run(), make_run(), make_run()]
    for name in ("pre", "post"):
        runs[0].cases += [case(scenario=name, base=name, implementation=one) for one in ("mla", "b")]
    runs[0].cases.append(case(implementation="b"))
    runs[1].cases += [case(scenario="post", base="post", implementation=one) for one in ("mla", "b")]
    found = cross_file.verdicts(series.result_files(["x", "y", "z"], runs))
    lacks = [str(one) for one in found if one.outcome == "absent"]
    assert lacks == ["B y: lacks pre; prefill, b", "C z: lacks pre; post; prefill, b"]
    assert not [one for one in found if one.outcome == "none"]
    assert [one.where for one in found if one.outcome == "open"] == [
        "prefill, mla",
        "post, mla",
        "prefill, mla",
    ]


def test_a_note_on_the_steps_leaves_the_ratio_in_its_sentence(make_run: Any) -> None:
    files = series.result_files(["/x/old.json", "/x/new.json"], [make_run(), make_run()])
    note = "compared are steps 2 to 3 of each pass"
    (base,) = make_run().cases
    case = Comparison(base, base, ratio=2.0, interval=(1.9, 2.1), verdict=SLOWER, note=note)
    outcome, text = cross_file._sentence(*files, case)
    assert outcome == "won"
    assert text == f"A old.json won, 2.0x as fast as B new.json (1.9 .. 2.1); {note}"
