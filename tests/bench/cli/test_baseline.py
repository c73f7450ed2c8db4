"""A run that is compared with an earlier one as soon as it is done."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla.bench import results
from mla.bench.run import scheduler

Bench = Callable[..., Any]

NOTHING_IN_COMMON = "nothing could be compared: time the same cases in both runs, with the same options"
GATE = ("--baseline", "base.json", "--fail-slower", "3%")


@pytest.fixture
def run(bench: Bench, small: list[str]) -> Bench:
    """Return a function that runs on a clock which shows so many milliseconds, after a base run at 2."""

    def run(milliseconds: str, *words: str) -> Any:
        virtual = ("--backend", "fake-virtual-clock", "-O", f"script={milliseconds}")
        return bench(*virtual, *small, *words, fakes=["virtual_clock"])

    assert run("2", "-o", "base.json").code == 0
    return run


def test_a_regression_is_exit_code_1_after_the_result(run: Bench) -> None:
    done = run("3", *GATE, "-o", "new.json")
    assert done.code == 1
    result, _, comparison = done.out.partition("this run against base.json\n")
    assert "Prefill Latency: 3 ms" in result
    assert comparison.count("SLOWER") == 2
    assert done.err.endswith(
        "regression: prefill, mla takes 1.500 times as long\n"
        "regression: decode, mla takes 1.500 times as long\n"
    )
    assert len(results.read(Path("new.json")).cases) == 2


def test_no_regression_is_exit_code_0(run: Bench) -> None:
    same = run("2", *GATE)
    assert (same.code, same.out.count("SAME")) == (0, 2)
    assert run("9", "--baseline", "base.json").code == 0, "without a limit, slower is no failure"


def test_stdout_of_a_machine_format_stays_that_format(run: Bench) -> None:
    done = run("3", *GATE, "--format", "csv")
    assert done.code == 1
    assert [row["scenario"] for row in csv.DictReader(io.StringIO(done.out))] == ["prefill", "decode"]
    assert "SLOWER" in done.err
    assert "| SLOWER |" in run("3", *GATE, "--format", "md").out


def test_a_gate_that_compares_nothing_is_no_pass(run: Bench) -> None:
    done = run("2", *GATE, "-a", "kv=1")
    assert done.code == 5
    assert "missing from the base run" in done.out
    assert done.error == NOTHING_IN_COMMON


def test_a_case_that_the_run_did_not_bring_closes_the_gate_unless_it_was_not_asked_for(run: Bench) -> None:
    both = ("--implementations", "mla,mla-reference")
    run("2", *both, "-o", "base.json")
    done = run("2", *GATE)
    assert done.code == 1
    assert done.err.count("not compared: ") == 2
    assert done.error == "not compared: decode, mla-reference: missing from the new run"
    assert run("2", *GATE, "--implementations", "mla").code == 0
    assert run("2", *GATE, "--scenario", "decode").code == 0
    assert run("2", "--baseline", "base.json").code == 0


def test_a_run_and_itself_or_its_copy_need_no_comparison(run: Bench, bench: Bench) -> None:
    run("2", "-o", "other.json")
    Path("copy.json").write_bytes(Path("base.json").read_bytes())
    for name, said in (
        ("base.json", "is compared with itself"),
        ("copy.json", "holds the same run as base.json"),
    ):
        done = bench("compare", "base.json", name, "--fail-slower", "3%")
        assert (done.code, done.out, done.err) == (0, f"{name} {said}: there is nothing to compare\n", "")
    both = bench("compare", "base.json", "copy.json", "other.json")
    assert (both.code, both.out.count("\nprefill"), both.out.count("nothing to compare")) == (0, 1, 1)


def test_files_of_other_cases_are_refused_in_one_sentence(run: Bench, bench: Bench) -> None:
    run("2", "-o", "other.json", "--scenario", "decode", "-a", "kv=1,2,3")
    done = bench("compare", "base.json", "other.json")
    assert (done.code, done.error) == (5, NOTHING_IN_COMMON)
    _, _, why, base, new = done.out.splitlines()
    assert (
        why == "none of 5 cases can be compared: missing from the base run (3); missing from the new run (2)"
    )
    assert base.startswith("the base run was `python -m mla.bench")
    assert new.startswith("the new run was `python -m mla.bench")


def test_mistakes_show_before_any_work(run: Bench) -> None:
    assert run("2", "--fail-slower", "3%").error == (
        "error: --fail-slower needs a run to compare with: add --baseline FILE."
    )
    gone = run("2", "--baseline", "gone.json")
    assert (gone.code, gone.out) == (2, "")
    assert gone.err.startswith("error: cannot read 'gone.json'")


@pytest.mark.parametrize(("status", "code"), [("wrong", 4), ("doubtful", 6)])
def test_a_run_that_is_wrong_or_doubtful_is_compared_as_well(
    run: Bench, bench: Bench, monkeypatch: pytest.MonkeyPatch, status: Any, code: int
) -> None:
    """What is wrong with it comes before a regression of its other cases, which is still said."""
    measure = scheduler.measure

    def spoiled(*arguments: Any) -> Any:
        outcome = measure(*arguments)
        case = outcome.run.cases[0]
        case.check, case.latency_ms, case.tokens_per_s = results.Check(status=status), None, None
        return outcome

    monkeypatch.setattr(scheduler, "measure", spoiled)
    done = run("3", *GATE, "-o", "new.json")
    gate = bench("compare", "base.json", "new.json", "--fail-slower", "3%")
    assert (done.code, gate.code) == (code, 4 if code == 4 else 1)
    assert done.out.partition("this run against base.json\n")[2].count("SLOWER") == 1
    assert "regression: decode, mla takes 1.500 times as long" in done.err
