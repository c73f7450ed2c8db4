"""A run that ended early goes on from its file, in real processes, and only with the same run."""

from __future__ import annotations

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
from mla.bench.limits.placing import limits

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
    with start("-o", "run.json", "--passes", "300") as child:
        wait_for_scenarios(child, 1)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=120)
    assert child.returncode == 130
    before = read("run.json").cases
    done = [case for case in before if not case.interrupted]
    assert 1 <= len(done) < 3
    with start("--resume", "run.json", "--passes", "300") as child:
        _, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    assert f"resuming   {len(done)} cases of 'run.json' are kept\n" in err
    after = read("run.json").cases
    assert [case.scenario for case in after] == ["decode kv=1", "decode kv=2", "decode kv=3"]
    assert all(case.passes == 300 and not case.interrupted for case in after)
    assert all(case in measured(after) for case in measured(done))
    for case in after:  # those that were kept as well
        assert case.roofline.floor_ms == pytest.approx(floor(read("run.json"), case))


def measured(cases: list[results.Case]) -> list[results.Case]:
    """Return cases without their place under the limits, which both processes measure."""
    return [msgspec.structs.replace(case, roofline=results.Roofline()) for case in cases]


def floor(run: results.Run, case: results.Case) -> float:
    """Return the milliseconds that the run's limits, the highest of both processes, allow a case."""
    found = limits(run.ceilings, case.dtype, case.cost.bytes)
    assert found is not None
    return max(1e3 * case.cost.bytes / found[0].value, 1e3 * case.cost.flops / found[1].value)


def test_a_killed_run_loses_the_scenario_it_was_in(start: Start) -> None:
    with start("-o", "run.json", "--passes", "300") as child:
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
    assert "warning" not in done.err


def test_nothing_is_measured_when_nothing_is_missing(bench: Bench, partial: list[str]) -> None:
    assert bench(*partial, "--resume", "run.json").code == 0
    first = read("run.json").cases
    done = bench(*partial, "--resume", "run.json")
    assert (done.code, read("run.json").cases) == (0, first)
    assert "of 3  decode" not in done.err


def test_what_was_cut_short_or_left_out_is_measured_again(bench: Bench, partial: list[str]) -> None:
    run = read("run.json")
    run.cases[0].passes = 2
    run.cases[1].check = results.Check(status="not run", reason="skipped by --budget")
    results.write(run, Path("run.json"))
    done = bench(*partial, "--resume", "run.json")
    assert "resuming   0 cases" in done.err
    assert [case.passes for case in read("run.json").cases] == [6, 6, 6]


def test_a_wrong_case_stays_wrong(bench: Bench, partial: list[str]) -> None:
    run = read("run.json")
    run.cases[0].check = results.Check(status="wrong", reason="as it was")
    run.cases[0].latency_ms = None
    results.write(run, Path("run.json"))
    assert bench(*partial, "--resume", "run.json").code == 4
    assert read("run.json").cases[0].check.reason == "as it was"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("--seed 1", "--seed was 0 and is 1"),
        ("--dtype float32", "--dtype was not given and is float32"),
        ("--attention absorbed", "--attention was not given and is absorbed"),
        ("--page-size 16", "--page-size was not given and is 16"),
        ("--ops reference", "--ops was not given and is reference"),
        ("--passes 7", "--passes was not given and is 7"),
        ("-O script=1", "-O was not given and is script=1"),
        ("--implementations mla-reference", "implementations was mla and is mla-reference"),
        ("-a batch=4", "workload or axes differ, it has no scenario 'decode kv=1 batch=4'"),
        ("--scenario prefill", "workload or axes differ, it has no scenario 'prefill kv=1'"),
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
    assert "only it has scenario 'decode kv=3'" in bench(*fewer, "--resume", "run.json").error
    text = Path("tiny.toml").read_text()
    Path("tiny.toml").write_text(text.replace("runs = 4", "runs = 5"))
    assert "a scenario has other lengths or counts" in bench(*partial, "--resume", "run.json").error
    Path("tiny.toml").write_text(text)
    Path("tiny.json").write_text(Path("tiny.json").read_text().replace("64", "128"))
    assert "config differs in hidden_size" in bench(*partial, "--resume", "run.json").error


def test_another_commit_or_environment_is_a_warning(bench: Bench, partial: list[str]) -> None:
    run = read("run.json")
    run.git_commit = "abc"
    run.environment["torch"] = "1.0"
    run.environment["slurm_job_id"] = "7"
    results.write(run, Path("run.json"))
    done = bench(*partial, "--resume", "run.json")
    assert done.code == 0
    (line,) = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    assert "kept cases were measured under other conditions: commit was abc and is " in line
    assert "torch was 1.0 and is " in line
    assert "slurm" not in line


def test_a_file_without_a_plan_or_without_a_run_is_refused(bench: Bench, partial: list[str]) -> None:
    run = read("run.json")
    run.plan = None
    results.write(run, Path("run.json"))
    refused = bench(*partial, "--resume", "run.json").error
    assert refused == "error: cannot resume 'run.json': it does not say what was planned; start a new run."
    assert bench(*partial, "--resume", "gone.json").error.startswith("error: cannot read 'gone.json'")
