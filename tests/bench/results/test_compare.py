"""Comparing result files: the verdicts, what may not be compared, and the exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mla.bench import results
from mla.bench.results.compare import compare

STEADY = [1.0, 1.001, 0.999, 1.002, 0.998, 1.0]


@pytest.fixture
def run(make_run: Any) -> Any:
    return lambda samples=tuple(STEADY), **changes: make_run(samples, **changes)


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(0.9, "FASTER"), (1.0, "SAME"), (1.01, "SAME"), (1.1, "SLOWER"), (1.02, "UNDECIDED")],
)
def test_verdicts_come_from_the_interval(run: Any, factor: float, verdict: str) -> None:
    (found,) = compare(run(), run([factor * sample for sample in STEADY]))
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(factor)
    assert found.interval is not None
    assert found.interval[0] <= factor <= found.interval[1]


def test_noise_makes_a_large_difference_undecided(run: Any) -> None:
    (found,) = compare(run(), run([1.0, 1.6, 1.1, 1.5, 0.9, 1.3]))
    assert found.ratio == pytest.approx(1.2)
    assert found.verdict == "UNDECIDED"


def test_too_few_passes_decide_nothing(run: Any) -> None:
    (found,) = compare(run([1.0] * 5), run([9.0] * 5))
    assert (found.verdict, found.interval) == ("UNDECIDED", None)
    assert "too few passes" in found.reason


def test_steps_of_a_pass_are_one_observation(run: Any) -> None:
    base, new = run([1.0, 3.0] * 6, steps_per_pass=2), run([2.0, 6.0] * 6, steps_per_pass=2)
    (found,) = compare(base, new)
    assert (found.base_ms, found.new_ms, found.verdict) == (2.0, 4.0, "SLOWER")
    assert compare(run([1.0, 3.0] * 3, steps_per_pass=2), new)[0].verdict == "UNDECIDED"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"history": [4, 1]}, "history differs"),
        ({"query_lens": [5, 3]}, "query_lens differs"),
        ({"clock": "device"}, "clock differs"),
        ({"base": "other"}, "the base run has no such case"),
        ({"point": {"kv": 4096}}, "the base run has no such case"),
        ({"op": "latent_attention"}, "the base run has no such case"),
        ({"dtype": "float32"}, "dtype differs: bfloat16 and float32"),
        ({"layers": 4}, "layers differs"),
        ({"implementation": "transformers"}, "the base run has no such case"),
    ],
)
def test_another_workload_is_refused(run: Any, change: dict[str, Any], reason: str) -> None:
    (found,) = compare(run(), run(**change))
    assert (found.verdict, found.reason) == ("REFUSED", reason)


def test_heads_differ_only_where_both_runs_name_them(run: Any) -> None:
    assert compare(run(heads=4), run(heads=8))[0].reason == "heads differs"
    assert compare(run(heads=None), run(heads=8))[0].verdict == "SAME"


def test_a_point_is_compared_with_its_own_dtype(run: Any) -> None:
    base, new = run(), run()
    wide = run([9 * sample for sample in STEADY], dtype="float32").cases
    base.cases += wide
    new.cases = [*wide, *new.cases]
    assert [found.verdict for found in compare(base, new)] == ["SAME", "SAME"]


@pytest.mark.parametrize(("field", "value"), [("attention", "absorbed"), ("config", {"hidden_size": 65})])
def test_another_layer_is_refused(run: Any, field: str, value: Any) -> None:
    other = run()
    setattr(other, field, value)
    (found,) = compare(run(), other)
    assert found.verdict == "REFUSED"
    assert field in found.reason


def test_a_case_without_a_number_is_refused(run: Any, make_run: Any) -> None:
    wrong = make_run(latency_ms=None, check=results.Check(status="wrong"))
    (found,) = compare(run(), wrong)
    assert found.reason == "the new run has no number, check: wrong"


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
    assert (none.code, none.err) == (5, "nothing could be compared\n")
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


@pytest.mark.usefixtures("files")
def test_show_prints_a_run_again(bench: Any) -> None:
    done = bench("show", "base.json")
    assert done.code == 0
    assert "Prefill Latency: 1.000 ms" in done.out
    assert bench("show", "base.json", "--format", "json").out.encode() == Path("base.json").read_bytes()


@pytest.mark.usefixtures("files")
def test_neither_needs_torch(process: Any, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    for words in (("compare", "base.json", "slow.json"), ("show", "base.json")):
        done = process(*words, path=[tmp_path])
        assert done.code == 0, done.err


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
