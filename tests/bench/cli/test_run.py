"""Real runs of tiny shapes: what is printed where, and what is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launch_variables import SECOND, SetVariables, launched
from transformers_peer import needs_transformers

from mla.bench import results

__all__ = ["launched"]
Bench = Callable[..., Any]
CPU = ("--backend", "cpu", "--threads", "1", "--implementations", "mla")
VIRTUAL = ("--backend", "fake-virtual-clock")
# What depends on the machine.
REMARKS = ("warning: ", "new lengths: ", "building ", "running ")


def read(path: str) -> results.Run:
    return results.decode(Path(path).read_bytes())


def latency(case: results.Case) -> results.Latency:
    assert case.latency_ms is not None
    return case.latency_ms


def test_a_run_prints_its_result_on_stdout_and_its_plan_on_stderr(bench: Bench, small: list[str]) -> None:
    done = bench(*CPU, *small, "-v")
    assert done.code == 0
    *_, prefill, decode = done.out.splitlines()
    assert re.fullmatch(r"Prefill Latency: ([\d.]+ ms|unreliable \(.* ms\))", prefill)
    assert re.fullmatch(r"Decode Throughput: ([\d.]+ tok/s|unreliable \(.* tok/s\))", decode)
    for word in ("backend", "config", "ops", "scenario", "plan", "memory"):
        assert any(line.startswith(f"{word} ") for line in done.err.splitlines())
        assert not any(line.startswith(f"{word} ") for line in done.out.splitlines() if "latency" not in line)


def test_the_reference_is_left_out_where_it_would_be_the_same(bench: Bench, small: list[str]) -> None:
    done = bench(*VIRTUAL, *small, "--dry-run", fakes=["virtual_clock"])
    assert "mla-reference is skipped: no fused op was chosen, so it is identical to mla" in done.err
    assert "plan       mla, interleaved; " in done.err


def test_stderr_shows_no_progress_bar_when_it_is_no_terminal(process: Bench, small: list[str]) -> None:
    done = process(*CPU, *small, "--runs", "2", "--passes", "2")
    assert done.code == 0
    assert "\x1b" not in done.err
    assert "\r" not in done.err
    assert "timing pass" not in done.err
    remarks = [line for line in done.err.splitlines() if line.startswith(REMARKS)]
    assert len(done.err.splitlines()) - len(remarks) == 3
    finished = [
        line
        for line in done.err.splitlines()
        if re.match(r"[12] of 2  (prefill|decode): mla ([\d.]+ ms|unreliable)", line)
    ]
    assert len(finished) == 2


def test_the_numbers_are_those_of_the_clock(bench: Bench, small: list[str]) -> None:
    done = bench(*VIRTUAL, *small, "-o", "run.json", fakes=["virtual_clock"])
    assert done.code == 0
    assert done.out.splitlines()[-2:] == [
        "Prefill Latency: unreliable (1.0 .. 4.0 ms)",
        "Decode Throughput: 800.0 tok/s",
    ]
    prefill, decode = read("run.json").cases
    assert latency(prefill).samples == [1, 2, 3, 4, 1, 2]
    assert latency(decode).samples == [1, 2, 3, 4] * 6
    assert (latency(decode).p10, latency(decode).median, latency(decode).p90) == (1, 2.5, 4)
    assert latency(decode).ci95 == (2.5, 2.5)
    assert decode.tokens_per_s is not None
    assert decode.tokens_per_s.median == pytest.approx(1000 * 2 * 4 / 10)
    assert {prefill.clock, decode.clock} == {"host"}


@pytest.mark.parametrize(("script", "code"), [("1,2,3,4", 6), ("2,2.1", 0)])
def test_an_unreliable_headline_is_an_exit_code_with_strict_alone(
    bench: Bench, small: list[str], script: str, code: int
) -> None:
    words = (*VIRTUAL[:2], "-O", f"script={script}", *small)
    assert bench(*words, fakes=["virtual_clock"]).code == 0
    done = bench(*words, "--strict", fakes=["virtual_clock"])
    assert done.code == code
    said = "--strict: Prefill Latency: unreliable (1.0 .. 4.0 ms)"
    assert (said in done.err) is bool(code)


def test_a_result_records_what_was_measured(bench: Bench, small: list[str]) -> None:
    bench(*CPU, *small, "--seed", "7", "--dtype", "float32", "--page-size", "16", "-o", "run.json")
    run = read("run.json")
    assert (run.schema_version, run.seed, run.dtype, run.page_size) == (
        results.SCHEMA_VERSION,
        7,
        "float32",
        16,
    )
    assert (run.backend.name, run.config["hidden_size"]) == ("cpu", 64)
    assert run.backend.version is not None
    assert {"python", "torch", "mla", "processor"} <= set(run.environment)
    prefill, decode = run.cases
    assert (prefill.query_lens, prefill.history) == ([3, 5], [4, 0])
    assert (decode.query_lens, decode.history) == ([1, 1], [5, 9])
    assert (decode.steps_per_pass, decode.passes) == (4, 6)
    assert decode.warmups >= 10  # the fewest that can be seen to have settled
    for case in run.cases:
        assert case.check.status == "ok"
        assert case.check.error_ratio is not None
        assert 0 < case.check.error_ratio <= 1
        assert case.ops["latent_attention"] == "reference"
        assert min(case.cost.flops, case.cost.bytes, case.memory.cache_bytes, case.memory.weight_bytes) > 0
        assert not case.interrupted
    assert prefill.plan_ms is not None


def test_stdout_of_a_machine_format_is_that_format_alone(process: Bench, small: list[str]) -> None:
    options = ["--runs", "2", "--passes", "2", "-o", "run.json", "--format", "json"]
    done = process(*VIRTUAL, *small, *options, fakes=["virtual_clock"])
    assert done.code == 0
    assert results.decode(done.out.encode()) == read("run.json")
    json.loads(done.out)


def test_code_that_is_not_packaged_can_be_measured(
    bench: Bench, small: list[str], monkeypatch: pytest.MonkeyPatch, install: Callable[[str], Path]
) -> None:
    source = (install("virtual_clock") / "fake_virtual_clock.py").read_text()
    Path("loose_backend.py").write_text(source)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    done = bench("--backend", "loose_backend:VirtualClock", *small, "-o", "run.json")
    assert done.code == 0
    run = read("run.json")
    assert (run.backend.name, run.backend.version) == ("virtual", None)
    assert "--backend loose_backend:VirtualClock " in run.cases[0].repro


def test_a_task_of_several_writes_its_own_result_with_what_slurm_said(
    bench: Bench, small: list[str], launched: SetVariables
) -> None:
    words = ("--passes", "1", "--scenario", "decode")
    launched(**SECOND, SLURM_JWT="secret", SLURM_JOB_USER="somebody")
    done = bench(*VIRTUAL, *small, *words, "-o", "run-%t.json", fakes=["virtual_clock"])
    assert done.code == 0
    assert "device" not in done.err.splitlines()[0], "a backend that counts no devices chooses none"
    text = Path("run-1.json").read_text()
    assert "secret" not in text
    assert "somebody" not in text
    result = results.decode(text.encode())
    facts = {key: value for key, value in result.environment.items() if "slurm" in key}
    assert facts == {name.lower(): value for name, value in SECOND.items()}
    assert all("--device" not in case.repro for case in result.cases)


@needs_transformers
def test_the_main_job_runs_at_full_size_and_compares_with_transformers(bench: Bench) -> None:
    counts = ("--runs", "2", "--passes", "2", "--warmups", "0", "--cache", "warm")
    done = bench("--backend", "cpu", *counts, "-o", "run.json")
    assert done.code == 0
    names = ["mla", "mla-reference", "transformers"]
    cases = read("run.json").cases
    assert [(case.scenario, case.implementation) for case in cases] == [
        (scenario, name) for scenario in ("prefill", "decode") for name in names
    ]
    assert {case.check.status for case in cases} == {"ok"}
    prefill, decode = (case for case in cases if case.implementation == "mla")
    assert (len(latency(prefill).samples), len(latency(decode).samples)) == (2, 4)
    assert len(done.out.splitlines()) <= 26
    assert len(done.err.splitlines()) <= 6
