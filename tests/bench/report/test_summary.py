"""The first screen: by how much, how far from the limit, how noisy, and what is wrong or in doubt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mla.bench import results
from mla.bench.report import summary

Case = Callable[..., results.Case]


def timed(case: Case, ms: float, **changes: Any) -> results.Case:
    """Return a case that takes so many milliseconds, in every pass about the same."""
    samples = [ms * (1 + 0.001 * (place % 3)) for place in range(6)]
    latency = results.Latency(
        median=ms, ci95=(0.99 * ms, 1.01 * ms), p10=ms, p90=1.002 * ms, samples=samples, drift=0.004
    )
    return case(**{"latency_ms": latency, "passes": 6, **changes})


def file(make_run: Any, *cases: results.Case, **changes: Any) -> summary.ResultFile:
    run = make_run()
    run.cases = list(cases)
    for name, value in changes.items():
        setattr(run, name, value)
    return summary.result_files(["run.json"], [run])[0]


def with_status(case: Case, status: Any, **changes: Any) -> results.Case:
    return case(check=results.Check(status=status, reason="because"), latency_ms=None, **changes)


def said(cases: Sequence[results.Case]) -> list[tuple[str, str]]:
    return [tuple(badge) for badge in summary.badges(cases) if badge.status not in ("unsteady", "soft")]


def test_a_tile_has_the_ratio_its_interval_the_limit_and_the_noise(make_run: Any, case: Case) -> None:
    near = results.Roofline(floor_ms=1.0, fraction=0.5, bound="memory")
    fast, slow = timed(case, 2.0, roofline=near), timed(case, 6.0, implementation="b", ops={"linear": "b"})
    (tile,) = summary.tiles(file(make_run, slow, fast))
    assert (tile.status, tile.where, tile.value) == ("ok", "prefill: mla", "3.00x")
    assert tile.text == "mla is 3.00x as fast as b (2.94 .. 3.06), at 50 % of the memory limit"
    assert (tile.number, tile.share) == ("2.00 ms", 50)
    assert (tile.noise, tile.unsteady) == ("steady: 80 % within 2.00 .. 2.00 ms, drift +0.4 %", False)


def test_a_drift_is_amber(make_run: Any, case: Case) -> None:
    drifting = timed(case, 2.0)
    assert drifting.latency_ms is not None
    drifting.latency_ms.drift = 0.31
    (tile,) = summary.tiles(file(make_run, drifting))
    assert tile.noise == "drifts: 80 % within 2.00 .. 2.00 ms, drift +31.0 %"
    assert tile.unsteady
    assert summary.badges([drifting])[1] == ("unsteady", "of 1 case: 1 drifting")


def test_no_winner_is_named_that_the_verdict_does_not_name(make_run: Any, case: Case) -> None:
    other = timed(case, 2.01, implementation="b", ops={"linear": "b"})
    slow = timed(case, 9.0, implementation="c", ops={"linear": "c"})
    (tile,) = summary.tiles(file(make_run, timed(case, 2.0), other, slow))
    assert (tile.value, tile.number) == ("2.00 ms", "")
    assert tile.text.startswith("no decision between mla and b: their intervals overlap")
    doubt = timed(case, 1.0, roofline=results.Roofline(doubt="faster than its floor"))
    (tile,) = summary.tiles(file(make_run, doubt, other))
    assert (tile.status, tile.share) == ("in-doubt", None)
    assert tile.text.endswith(", but its limit or its time is suspect")


def test_what_has_no_number_is_in_the_tile(make_run: Any, case: Case) -> None:
    wrong = with_status(case, "wrong", implementation="b")
    (tile,) = summary.tiles(file(make_run, timed(case, 2.0), wrong))
    assert (tile.status, tile.value) == ("wrong", "2.00 ms")
    assert tile.text.endswith("; no number: b (wrong)")
    (tile,) = summary.tiles(file(make_run, wrong))
    assert (tile.status, tile.value, tile.text) == ("wrong", "no number", "no number: b (wrong)")


def test_a_grid_is_a_sentence_and_a_small_one_alone_has_tiles(make_run: Any, case: Case) -> None:
    def points(count: int) -> list[results.Case]:
        return [case(scenario=f"s{kv}", base="sweep", point={"kv": kv}) for kv in range(count)]

    mixed = file(make_run, *points(3), case())
    assert [tile.where for tile in summary.tiles(mixed)] == ["prefill: mla"]
    assert [line for line in summary.said(mixed) if line.startswith("sweep (3 points): ")]
    assert len(summary.tiles(file(make_run, *points(3)))) == 3
    assert summary.tiles(file(make_run, *points(50))) == []


def test_badges_count_cases_the_worst_first(case: Case) -> None:
    doubt = case(roofline=results.Roofline(doubt="faster than its floor"))
    cases = [case(), with_status(case, "not run"), with_status(case, "doubtful"), with_status(case, "wrong")]
    assert said([*cases, doubt, case(interrupted=True)]) == [
        ("wrong", "1 of 6 cases wrong"),
        ("doubtful", "1 of 6 cases doubtful: no number"),
        ("in-doubt", "1 of 6 cases with a suspect limit or time"),
        ("not-run", "1 of 6 cases not run"),
        ("interrupted", "1 of 6 cases interrupted"),
    ]
    assert said([case(latency_ms=None), case()]) == [("not-timed", "1 of 2 cases not timed")]
    assert said([case(), case()]) == [("ok", "all 2 cases agree with the oracle")]
    assert said([]) == [("not-run", "no case was run")]
    yardstick = case(implementation="read", check=results.Check(status="not run", reason="only reads"))
    assert said([case(), yardstick]) == [("ok", "the only case agrees with the oracle")]


def test_files_are_compared_with_their_intervals_and_verdicts(make_run: Any, case: Case) -> None:
    runs = [make_run(), make_run()]
    for run, times in zip(runs, ({"mla": 2.0, "a": 1.0}, {"mla": 1.0, "b": 1.0}), strict=True):
        run.cases = [timed(case, ms, implementation=name) for name, ms in times.items()]
    runs[1].seed = 1
    table = summary.compared(*summary.result_files(["/x/old.json", "/x/new.json"], runs))
    assert table.title == "B x/new.json against A x/old.json"
    assert list(table.rows[0])[4:] == ["0.500", "0.490 .. 0.510", "FASTER"]
    assert table.notes == [
        "warning: seed differs: 0 and 1",
        "prefill, b: missing from the base run",
        "prefill, a: missing from the new run",
    ]


def test_lengths_are_folded() -> None:
    assert summary.folded([50, 50, 1, 50]) == "50 x2, 1, 50"
