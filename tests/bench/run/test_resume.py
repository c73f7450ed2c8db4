"""A run that ended early goes on from its file, in real processes, and only with the same run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mla.bench import results
from mla.bench.limits.roofline import limits
from mla.bench.results.cases import latency_of, passes_of, throughput_of
from mla.bench.terminal.lines import OTHERS
from mla.command.environment import OtherLoad

Bench = Callable[..., Any]
Start = Callable[..., "subprocess.Popen[str]"]

VIRTUAL = ("--backend", "fake-virtual-clock")
GRID = ("--scenario", "decode", "-a", "kv=1,2,3")
# A shell starts background jobs with SIGINT ignored, and children inherit that.
LAUNCH = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('mla.bench', run_name='__main__', alter_sys=True)"
)


def read(path: str) -> results.Run:
    return results.read(Path(path))


@pytest.fixture
def start(install: Callable[[str], Path], small: list[str]) -> Start:
    """Return a function that starts a run of a grid on the virtual clock and hands over the process."""

    def start(*words: str) -> subprocess.Popen[str]:
        path = os.pathsep.join(
            filter(None, [str(install("virtual_clock")), os.environ.get("PYTHONPATH", "")])
        )
        return subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *VIRTUAL, *small, *GRID, *words],
            env={**os.environ, "PYTHONPATH": path},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


def wait_for_scenarios(child: subprocess.Popen[str], count: int) -> None:
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith(f"{count} of 3  "):
            return
    raise AssertionError(f"the run ended with {child.wait()}")


def test_ctrl_c_and_then_resume(start: Start) -> None:
    with start("-o", "run.json", "--passes", "120") as child:
        wait_for_scenarios(child, 1)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=120)
    assert child.returncode == 130
    before = read("run.json").cases
    done = [case for case in before if not case.interrupted]
    assert 1 <= len(done) < 3
    with start("--resume", "run.json", "--passes", "120") as child:
        _, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    assert f"resuming   {len(done)} cases of 'run.json' are kept\n" in err
    after = read("run.json").cases
    assert [case.scenario for case in after] == ["decode kv=1", "decode kv=2", "decode kv=3"]
    assert all(case.passes == 120 and not case.interrupted for case in after)
    assert all(case in measured(after) for case in measured(done))
    for case in after:  # those that were kept as well
        assert case.roofline.floor_ms == pytest.approx(floor(read("run.json"), case))


def measured(cases: list[results.Case]) -> list[results.Case]:
    """Return cases without their place under the limits, which both processes measure."""
    return [msgspec.structs.replace(case, roofline=results.Roofline()) for case in cases]


def floor(run: results.Run, case: results.Case) -> float:
    """Return the milliseconds that the run's limits, the highest of both processes, allow a case."""
    peaks = limits(run.ceilings, case.dtype, case.cost.bytes)
    assert peaks is not None
    return max(1e3 * case.cost.bytes / peaks[0].value, 1e3 * case.cost.flops / peaks[1].value)


def test_a_killed_run_loses_the_scenario_it_was_in(start: Start) -> None:
    with start("-o", "run.json", "--passes", "120") as child:
        wait_for_scenarios(child, 2)
        child.kill()
        child.communicate(timeout=120)
    assert len(read("run.json").cases) == 2


@pytest.fixture
def partial(bench: Bench, small: list[str]) -> list[str]:
    """Write a file in which the case of kv=2 is missing, and return the options that made it."""
    words = [*VIRTUAL, *small, *GRID]
    assert bench(*words, "-o", "run.json", fakes=["virtual_clock"]).code == 0
    run = read("run.json")
    del run.cases[1]
    results.write(run, Path("run.json"))
    return words


def test_a_resumed_run_may_be_written_elsewhere(bench: Bench, partial: list[str]) -> None:
    before = Path("run.json").read_bytes()
    done = bench(*partial, "--resume", "run.json", "-o", "whole.json")
    assert done.code == 0
    assert Path("run.json").read_bytes() == before
    whole, kept = read("whole.json").cases, read("run.json").cases
    assert [case.scenario for case in whole] == ["decode kv=1", "decode kv=2", "decode kv=3"]
    assert measured([whole[0], whole[2]]) == measured(kept)
    assert whole[1].latency_ms is not None


def test_nothing_is_measured_when_nothing_is_missing(bench: Bench, partial: list[str]) -> None:
    assert bench(*partial, "--resume", "run.json").code == 0
    first = read("run.json").cases
    done = bench(*partial, "--resume", "run.json")
    assert (done.code, read("run.json").cases) == (0, first)
    assert "of 3  decode" not in done.err


@pytest.mark.parametrize(("before", "after"), [("1.6 of 2", "1.6 of 2"), ("", "0.9 of 2")])
def test_other_load_beside_kept_cases_is_kept(
    bench: Bench, partial: list[str], monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    monkeypatch.setattr(OtherLoad, "remark", lambda *_: "0.9 of 2")
    run = read("run.json")
    run.environment.pop(OTHERS, None)
    run.environment |= {OTHERS: before} if before else {}
    results.write(run, Path("run.json"))
    for _ in range(2):  # the second time nothing is missing
        assert bench(*partial, "--resume", "run.json").code == 0
        assert read("run.json").environment.get(OTHERS, "") == after


def test_what_was_cut_short_or_left_out_is_measured_again(bench: Bench, partial: list[str]) -> None:
    run = read("run.json")
    short, left_out = run.cases
    assert short.latency_ms is not None
    assert short.tokens_per_s is not None
    short.passes = 2
    short.latency_ms.samples = short.latency_ms.samples[: 2 * short.steps_per_pass]
    withhold(left_out, "not run", "skipped by --budget")
    results.write(run, Path("run.json"))
    done = bench(*partial, "--resume", "run.json")
    assert "resuming   no case of 'run.json' is complete, so all are measured\n" in done.err
    assert [case.passes for case in read("run.json").cases] == [6, 6, 6]


def test_a_slow_yardstick_is_complete_with_the_passes_it_was_given(bench: Bench, partial: list[str]) -> None:
    """Two of four steps and three of six passes: less than is planned, and no less than was due."""
    for due, kept in ((3, 2), (4, 1)):
        run = read("run.json")
        case = run.cases[0]
        assert case.latency_ms is not None
        assert case.tokens_per_s is not None
        case.passes, case.steps_per_pass = 3, 2
        cut = passes_of(case)[:3]
        case.latency_ms, case.roofline = latency_of(cut), results.Roofline()
        case.tokens_per_s, case.switch_steps = throughput_of(cut, sum(case.query_lens)), []
        case.planned = results.Planned(passes=6, steps=4, due=due)
        results.write(run, Path("run.json"))
        assert f"resuming   {kept} cases" in bench(*partial, "--resume", "run.json", "-o", "other.json").err


def test_a_yardstick_is_held_to_the_first_implementation_even_if_that_was_kept_or_ran_before(
    bench: Bench, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is cut where the first one has no time."""
    asked: list[float] = []
    monkeypatch.setattr(
        "mla.bench.measure.engine.shortened",
        lambda scenario, variants, first_ms, *given: asked.append(first_ms),
    )
    words = (*VIRTUAL, *small, "--scenario", "decode", "--layers", "2")
    words = (*words, "--implementations", "mla,mla-reference")
    assert bench(*words, "-o", "run.json", fakes=["virtual_clock"]).code == 0
    run = read("run.json")
    kept = run.cases[0]
    assert kept.latency_ms is not None
    results.write(msgspec.structs.replace(run, cases=[kept]), Path("run.json"))
    warm = asked.copy()
    asked.clear()
    bench(*words, "--resume", "run.json", "-o", "other.json")
    assert asked == [2 * kept.latency_ms.median]
    withhold(kept, "wrong", "it is")
    results.write(msgspec.structs.replace(run, cases=[kept]), Path("run.json"))
    asked.clear()
    bench(*words, "--resume", "run.json", "-o", "other.json")
    assert asked == []
    monkeypatch.setattr("mla.bench.plan.memory.MemoryPlan.side_by_side", False)  # it has run before, alone
    bench(*words)
    assert asked == warm != []


def withhold(case: results.Case, status: Any, reason: str) -> None:
    """Take a case's number away."""
    case.check = results.Check(status=status, reason=reason)
    case.latency_ms = case.tokens_per_s = None
    case.roofline = results.Roofline()
    case.timings = []


def test_a_wrong_case_stays_wrong_and_a_doubtful_one_is_measured_again(
    bench: Bench, partial: list[str]
) -> None:
    run = read("run.json")
    withhold(run.cases[0], "wrong", "as it was")
    withhold(run.cases[1], "doubtful", "the clocks disagree")
    results.write(run, Path("run.json"))
    done = bench(*partial, "--resume", "run.json")
    assert done.code == 4
    assert "resuming   1 cases" in done.err
    first, *others = read("run.json").cases
    assert (first.check.status, first.check.reason) == ("wrong", "as it was")
    assert [case.check.status for case in others] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("--seed 1", "--seed was 0 and is 1"),
        ("--dtype float32", "--dtype was not given and is float32"),
        ("--passes 7", "--passes was not given and is 7"),
        ("-O script=1", "-O was not given and is script=1"),
        ("--implementations mla-reference", "implementations was mla and is mla-reference"),
        ("-a batch=4", "workload or axes differ, only one of them has scenario 'decode kv=1"),
        ("--scenario prefill", "workload or axes differ, only one of them has scenario 'prefill kv=1'"),
    ],
)
def test_another_run_is_refused(bench: Bench, partial: list[str], change: str, reason: str) -> None:
    before = Path("run.json").read_bytes()
    done = bench(*partial, *change.split(), "--resume", "run.json")
    assert (done.code, done.out) == (2, "")
    start = "error: cannot resume 'run.json', it holds another run: "
    assert done.error.startswith(start)
    assert reason in done.error
    assert done.error.endswith(". Repeat its options, or write a new file.")
    assert Path("run.json").read_bytes() == before


def test_another_grid_workload_or_config_is_refused(bench: Bench, partial: list[str]) -> None:
    fewer = [word.replace("kv=1,2,3", "kv=1,2") for word in partial]
    assert "only one of them has scenario 'decode kv=3'" in bench(*fewer, "--resume", "run.json").error
    text = Path("tiny.toml").read_text()
    Path("tiny.toml").write_text(text.replace("runs = 4", "runs = 5"))
    assert "a scenario has other lengths or counts" in bench(*partial, "--resume", "run.json").error
    Path("tiny.toml").write_text(text)
    Path("tiny.json").write_text(Path("tiny.json").read_text().replace("64", "128"))
    assert "config's hidden_size was 64 and is 128" in bench(*partial, "--resume", "run.json").error


FACTS = {
    "backend.name": ("other", "backend name was other and is virtual"),
    "backend.build": ("0123", "backend build was 0123 and is "),
    "backend.device": ("H9000", "backend device was H9000 and is "),
    "environment.torch": ("1.0", "torch was 1.0 and is "),
    "environment.OMP_NUM_THREADS": ("77", "OMP_NUM_THREADS was 77 and is "),
    "dtype": ("float16", "dtype was float16 and is bfloat16"),
    "seed": (3, "seed was 3 and is 0"),
    "config": ({"hidden_size": 65}, "config's hidden_size was 65 and is 64"),
    "plan.implementations": (["mla-reference"], "implementations was mla-reference and is mla"),
    "plan.digest": ("0", "workload differs: "),
    "plan.options": (
        ["--backend", "fake-virtual-clock", "--threads", "3"],
        "--threads was 3 and is not given",
    ),
    "cases.0.ops": (
        {"latent_attention": "fast"},
        "latent_attention of case 'decode kv=1, mla' was fast and is ",
    ),
}


def test_a_file_of_another_run_is_never_completed(bench: Bench, partial: list[str]) -> None:
    """Nobody but the file says so: the command is the same."""
    before = Path("run.json").read_bytes()
    for path, (value, reason) in FACTS.items():
        document = json.loads(before)
        *folders, last = path.split(".")
        place = document
        for name in folders:
            place = place[int(name) if isinstance(place, list) else name]
        place[last] = {**place[last], **value} if path == "config" else value
        Path("run.json").write_text(json.dumps(document))
        done = bench(*partial, "--resume", "run.json")
        assert (done.code, done.out) == (2, ""), path
        assert reason in done.error, path
        assert done.error.startswith("error: "), path
        assert json.loads(Path("run.json").read_bytes()) == document, path
    document = json.loads(before)
    del document["backend"]["build"]  # as versions before wrote
    Path("run.json").write_text(json.dumps(document))
    assert "backend build was not given and is " in bench(*partial, "--resume", "run.json").error


def test_another_commit_job_or_clock_is_the_same_run(bench: Bench, partial: list[str]) -> None:
    run = read("run.json")
    run.git_commit = "abc"
    run.environment |= {"backend.clock": "7 MHz", "slurm_job_id": "7", "local_rank": "1", "resumed": "once"}
    results.write(run, Path("run.json"))
    assert bench(*partial, "--resume", "run.json").code == 0
    assert len(read("run.json").cases) == 3


def test_another_state_of_the_backend_has_another_build(
    bench: Bench, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plugin that is edited in place, with the same version and in no work tree."""
    source = "from mla_backends.testing import HostBackend\nclass Mine(HostBackend):\n    pass\n"
    (tmp_path / "edited_in_place.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--backend", "edited_in_place:Mine", *small, "--scenario", "decode"]
    assert bench(*words, "-o", "run.json").code == 0
    assert bench(*words, "--resume", "run.json").code == 0
    (tmp_path / "edited_in_place.py").write_text(source + "# another kernel\n")
    assert "backend build was " in bench(*words, "--resume", "run.json").error


def test_a_file_without_a_plan_or_without_a_run_is_refused(bench: Bench, partial: list[str]) -> None:
    run = read("run.json")
    run.plan = None
    results.write(run, Path("run.json"))
    refused = bench(*partial, "--resume", "run.json").error
    assert refused == "error: cannot resume 'run.json': it does not say what was planned; start a new run."
    assert bench(*partial, "--resume", "gone.json").error.startswith("error: cannot read 'gone.json'")
