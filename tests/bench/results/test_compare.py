"""Comparing result files: the verdicts, what may not be compared, and the exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mla.bench import results
from mla.bench.results.compare import compare, warnings

STEADY = [1.0, 1.001, 0.999, 1.002, 0.998, 1.0]


@pytest.fixture
def run(make_run: Any) -> Any:
    return lambda samples=tuple(STEADY), **changes: make_run(samples, **changes)


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(0.9, "FASTER"), (1.0, "SAME"), (1.01, "SAME"), (1.1, "SLOWER"), (1.02, "UNDECIDED")],
)
def test_verdicts_come_from_the_interval(run: Any, factor: float, verdict: str) -> None:
    (comparison,) = compare(run(), run([factor * sample for sample in STEADY]))
    assert comparison.verdict == verdict
    assert comparison.ratio == pytest.approx(factor)
    assert comparison.interval is not None
    assert comparison.interval[0] <= factor <= comparison.interval[1]


@pytest.mark.parametrize(
    "name", ["torch_threads", "OMP_NUM_THREADS", "KMP_AFFINITY", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"]
)
def test_how_threads_wait_and_where_they_run_is_told_where_it_differs(run: Any, name: str) -> None:
    base, new = run(), run()
    new.environment = {**base.environment, name: "10000"}
    assert warnings(base, new) == [f"{name} differs: unset and 10000"]
    base.environment = new.environment
    assert warnings(base, new) == []


def test_too_few_passes_decide_nothing(run: Any) -> None:
    (comparison,) = compare(run([1.0] * 5), run([9.0] * 5))
    assert (comparison.verdict, comparison.interval) == ("UNDECIDED", None)
    assert "too few passes" in comparison.reason


def test_steps_of_a_pass_are_one_observation(run: Any) -> None:
    base, new = run([1.0, 3.0] * 6, steps_per_pass=2), run([2.0, 6.0] * 6, steps_per_pass=2)
    (comparison,) = compare(base, new)
    assert (comparison.ratio, comparison.verdict) == (2.0, "SLOWER")
    assert compare(run([1.0, 3.0] * 3, steps_per_pass=2), new)[0].verdict == "UNDECIDED"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"history": [4, 1]}, "history differs"),
        ({"query_lens": [5, 3]}, "query_lens differs"),
        ({"clock": "device"}, "clock differs"),
        ({"base": "other"}, "missing from the base run"),
        ({"point": {"kv": 4096}}, "missing from the base run"),
        ({"op": "latent_attention"}, "missing from the base run"),
        ({"dtype": "float32"}, "dtype differs: bfloat16 and float32"),
        ({"layers": 4}, "layers differs"),
        ({"implementation": "transformers"}, "missing from the base run"),
    ],
)
def test_another_workload_is_refused(run: Any, change: dict[str, Any], reason: str) -> None:
    comparison, *missing = compare(run(), run(**change))
    assert (comparison.verdict, comparison.reason) == ("REFUSED", reason)
    assert [other.reason for other in missing] == ["missing from the new run"] * ("missing" in reason)


def test_heads_differ_only_where_both_runs_name_them(run: Any) -> None:
    assert compare(run(heads=4), run(heads=8))[0].reason == "heads differs"
    assert compare(run(heads=None), run(heads=8))[0].verdict == "SAME"


def test_a_point_is_compared_with_its_own_dtype(run: Any) -> None:
    base, new = run(), run()
    wide = run([9 * sample for sample in STEADY], dtype="float32").cases
    base.cases += wide
    new.cases = [*wide, *new.cases]
    assert [comparison.verdict for comparison in compare(base, new)] == ["SAME", "SAME"]


@pytest.mark.parametrize(("field", "value"), [("attention", "absorbed"), ("config", {"hidden_size": 65})])
def test_another_layer_is_refused(run: Any, field: str, value: Any) -> None:
    other = run()
    setattr(other, field, value)
    (comparison,) = compare(run(), other)
    assert comparison.verdict == "REFUSED"
    assert field in comparison.reason


def withheld(run: Any, status: str, reason: str = "", **changes: Any) -> Any:
    """Return a run whose case has no number."""
    check = results.Check(status=status, reason=reason)
    return run(latency_ms=None, tokens_per_s=None, clock="none", passes=0, check=check, **changes)


@pytest.mark.parametrize("status", ["wrong", "doubtful", "not run"])
def test_a_case_without_a_number_is_refused_for_that_alone(run: Any, status: str) -> None:
    """It has no clock either, which is no difference of its own."""
    none = withheld(run, status, "because")
    assert compare(run(), none)[0].reason == f"the new run has no number, check: {status} (because)"
    assert compare(none, run())[0].reason == f"the base run has no number, check: {status} (because)"
    assert {comparison.verdict for comparison in compare(run(), none) + compare(none, run())} == {"REFUSED"}
    assert warnings(run(), none) == warnings(none, run()) == []


def gate(bench: Any, base: results.Run, new: results.Run, *words: str) -> Any:
    results.write(base, Path("base.json"))
    results.write(new, Path("new.json"))
    return bench("compare", "base.json", "new.json", *words)


def two(run: Any, second: results.Run) -> results.Run:
    """Return a run with the usual case and another implementation's."""
    both = run()
    both.cases += second.cases
    return both


LIMIT = ("--fail-slower", "3%")
REFERENCE = {"implementation": "mla-reference"}


@pytest.mark.parametrize(
    ("status", "without", "with_limit"), [("wrong", 4, 4), ("doubtful", 6, 6), ("not run", 0, 1)]
)
def test_no_gate_is_green_for_a_case_that_lost_its_number(
    run: Any, bench: Any, status: str, without: int, with_limit: int
) -> None:
    base, new = two(run, run(**REFERENCE)), two(run, withheld(run, status, "because", **REFERENCE))
    assert gate(bench, base, new).code == without
    done = gate(bench, base, new, *LIMIT)
    assert done.code == with_limit
    assert "prefill, mla-reference" in done.err
    assert "clock" not in done.out
    back = gate(bench, new, base, *LIMIT)
    assert back.code == 0, "nothing was lost"
    assert f"the base run has no number, check: {status} (because)" in back.out


@pytest.mark.parametrize(("status", "code"), [("wrong", 4), ("doubtful", 6)])
def test_a_new_case_without_a_number_is_red_and_one_that_never_had_one_is_not(
    run: Any, bench: Any, status: str, code: int
) -> None:
    bad = two(run, withheld(run, status, **REFERENCE))
    assert gate(bench, run(), bad, *LIMIT).code == code
    assert gate(bench, bad, bad, *LIMIT).code == 0


def test_a_case_that_vanished_is_listed_and_closes_the_gate(run: Any, bench: Any) -> None:
    base, new = two(run, run(**REFERENCE)), run()
    done = gate(bench, base, new)
    assert (done.code, done.err) == (0, "")
    assert "prefill, mla-reference: missing from the new run\n" in done.out
    gone = gate(bench, base, new, *LIMIT)
    assert gone.code == 1
    assert gone.err == "not compared: prefill, mla-reference: missing from the new run\n"
    assert gate(bench, new, base, *LIMIT).code == 0, "a new case is no regression"
    none = two(run, withheld(run, "not run", **REFERENCE))
    assert gate(bench, none, new, *LIMIT).code == 0, "it had no number"
    for place in range(4):
        base.cases += run(**REFERENCE, scenario=f"long {place}", base=f"long {place}").cases
    line = "prefill, mla-reference; long 0, mla-reference; long 1, mla-reference and 2 more: missing from"
    assert line in gate(bench, base, new).out


def test_a_case_that_became_another_closes_the_gate(run: Any, bench: Any) -> None:
    """The gate cannot judge it: here its history grew, or it was timed by another clock."""
    for change in ({"history": [4, 1]}, {"clock": "device"}, {"dtype": "float32"}):
        base, new = two(run, run(**REFERENCE)), two(run, run(**REFERENCE, **change))
        done = gate(bench, base, new, *LIMIT)
        assert (done.code, gate(bench, base, new).code) == (1, 0)
        assert done.err.startswith("not compared: prefill, mla-reference: ")


def test_wrong_comes_before_a_regression_and_that_before_doubtful(run: Any, bench: Any) -> None:
    slow = [2 * sample for sample in STEADY]
    base = two(run, run(**REFERENCE))
    for status, code in (("wrong", 4), ("doubtful", 1)):
        new = run(slow)
        new.cases += withheld(run, status, **REFERENCE).cases
        done = gate(bench, base, new, *LIMIT)
        assert done.code == code
        assert "regression: prefill, mla takes 2.000 times as long" in done.err
        assert f"{status} result: prefill, mla-reference has no number" in done.err


def test_a_gate_without_an_interval_judges_nothing(run: Any, bench: Any) -> None:
    done = gate(bench, run([1.0] * 5), run([9.0] * 5), *LIMIT)
    assert done.code == 5
    assert done.err == "no case has an interval, so the gate cannot decide: time at least 6 passes\n"
    assert " ~9.000 " in done.out, "a ratio without an interval is marked"


def test_figures_are_those_of_the_runs_tables_and_make_the_ratio(run: Any, bench: Any) -> None:
    """Most steps take 1 ms, one of every pass 11 ms: their mean is not what a table calls latency."""
    base = run([1.0, 1.0, 1.0, 11.0] * 6, steps_per_pass=4, mode="decode")
    new = run([2.0, 2.0, 2.0, 2.0] * 6, steps_per_pass=4, mode="decode")
    done = gate(bench, base, new)
    (row,) = [line.split() for line in done.out.splitlines() if line.startswith("prefill   mla")]
    assert row[2:5] == ["1", "2", "2.000"]
    for name, latency in (("base.json", "1"), ("new.json", "2")):
        assert f"prefill   mla             {latency} ms" in bench("show", name).out


def test_slow_steps_that_a_median_does_not_see_are_slower(run: Any, bench: Any) -> None:
    base = run([1.0, 1.0, 1.0, 1.0] * 6, steps_per_pass=4)
    new = run([1.0, 1.0, 1.0, 11.0] * 6, steps_per_pass=4)
    (comparison,) = compare(base, new)
    assert (comparison.ratio, comparison.verdict) == (1.0, "SLOWER")
    assert comparison.reason == "whole passes take 3.500 to 3.500 times as long: some steps are slow"
    done = gate(bench, base, new, *LIMIT)
    assert done.code == 1
    assert "takes at least 3.500 times as long in whole passes" in done.err


@pytest.fixture
def files(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    other = run([1.1 * sample for sample in STEADY])
    other.backend.device = "another CPU"
    results.write(run(), Path("base.json"))
    results.write(other, Path("slow.json"))
    results.write(run(history=[1, 1]), Path("other.json"))


@pytest.mark.usefixtures("files")
def test_the_command_gates_on_the_bound(bench: Any) -> None:
    done = bench("compare", "base.json", "slow.json")
    assert (done.code, done.err) == (0, "")
    assert "warning: device differs: a CPU and another CPU" in done.out
    assert "SLOWER" in done.out
    late = bench("compare", "base.json", "slow.json", "--fail-slower", "3%")
    assert late.code == 1
    assert late.err == "regression: prefill, mla takes 1.100 times as long\n"
    assert bench("compare", "base.json", "slow.json", "--fail-slower", "20").code == 0
    assert bench("compare", "slow.json", "base.json", "--fail-slower", "0%").code == 0
    assert "| prefill | mla |" in bench("compare", "base.json", "slow.json", "--format", "md").out


@pytest.mark.usefixtures("files")
def test_files_that_cannot_be_compared(bench: Any) -> None:
    none = bench("compare", "base.json", "other.json")
    said = "nothing could be compared: time the same cases in both runs, with the same options\n"
    assert (none.code, none.err) == (5, said)
    assert "history differs" in none.out
    Path("broken.json").write_text("{}")
    for name, message in (
        ("gone.json", "cannot read 'gone.json'"),
        ("broken.json", "'broken.json' is not a"),
    ):
        done = bench("compare", "base.json", name)
        assert done.code == 2
        assert message in done.err
        assert len(done.err.splitlines()) == 1
    assert "is not a valid percentage" in bench("compare", "base.json", "slow.json", "--noise", "much").err


def test_fields_that_one_version_did_not_write_are_no_difference(run: Any) -> None:
    old, new = run(), run()
    old.config = {"hidden_size": 64, "rope_scaling": {"factor": 40.0}}
    new.config = {
        "hidden_size": 64,
        "rope_scaling": {"factor": 40.0, "truncate": True},
        "q_latent_scale": 1.0,
    }
    assert compare(old, new)[0].verdict == "SAME"
    new.config["rope_scaling"]["factor"] = 32.0
    assert compare(old, new)[0].reason == "config differs in rope_scaling"
