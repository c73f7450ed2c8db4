"""An op that refuses a batch costs its own implementation that scenario, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla.bench import results
from mla.bench.subjects import base, fixture
from mla.bench.terminal.run_table import headlines
from mla_backends import BackendError
from mla_backends.testing import HostBackend

Bench = Callable[..., Any]

SECOND, REFERENCE = "mla[latent_attention=second]", "mla[latent_attention=reference]"
NAMES = f"{SECOND},{REFERENCE},mla"
LONG, BOTH = ("-a", "kv=30"), ("-a", "kv=5,30")
PLACES = ["batch", "prepare", "call"]


@pytest.fixture
def measure(bench: Bench, small: list[str]) -> Bench:
    """Return `bench` for a decode scenario of these implementations."""

    def measure(names: str, refuse: str, *words: str) -> Any:
        chosen = ["--implementations", names] if names else []
        chosen += ["-O", f"refuse={refuse}", "-o", "run.json", "--passes", "2", "--runs", "2"]
        chosen += ["--scenario", "decode", "--mode", "eager", "--clock", "host"]
        return bench("--backend", "several_ops:SeveralOps", *small, *chosen, *words)

    return measure


def read() -> results.Run:
    return results.read(Path("run.json"))


def refused_cases() -> list[tuple[str, str]]:
    return [
        (case.scenario, case.implementation)
        for case in read().cases
        if case.latency_ms is None and case.check.status == "not run"
    ]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("axis", [LONG, BOTH])
def test_the_others_are_timed_checked_and_compared(measure: Bench, place: str, axis: tuple[str, str]) -> None:
    done = measure(NAMES, f"second:{place}", *axis)
    assert done.code == 0, done.err
    assert refused_cases() == [("decode kv=30", SECOND)]
    refused, reference, plain = read().cases[-3:]
    assert "20 tokens. Leave `" in refused.check.reason
    assert "--ops" not in refused.check.reason
    assert f"decode kv=30, {SECOND}: {refused.check.reason}" in done.out
    assert f"decode kv=30, {SECOND} is skipped: {refused.check.reason}" in done.err
    for kept, other in ((reference, plain), (plain, reference)):
        assert (kept.check.status, kept.passes) == ("ok", 2)
        assert kept.interleaved_with == [other.implementation]
        assert [agreement.implementation for agreement in kept.agreement] == [other.implementation]
    assert f"[decode kv=30, {REFERENCE}]: " in headlines(read())[-1]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("names", ["", "mla-reference,mla"])
def test_the_reference_alone_is_no_success_where_the_ops_of_the_policy_refuse(
    measure: Bench, place: str, names: str
) -> None:
    """What was to be judged has no number; the yardstick's is kept and printed."""
    done = measure(names, f"first:{place}", *LONG)
    assert done.code == 3
    assert done.error.startswith("error: scenario 'decode kv=30', implementation 'mla': ")
    assert refused_cases() == [("decode kv=30", "mla")]
    cases = {case.implementation: case for case in read().cases}
    assert cases["mla"].check.reason.endswith("(`--ops reference`).")
    assert cases["mla-reference"].latency_ms is not None
    assert "mla-reference" in done.out


def test_a_number_in_another_scenario_is_one(measure: Bench) -> None:
    assert measure("", "first:batch", *BOTH).code == 0
    assert refused_cases() == [("decode kv=30", "mla")]


@pytest.mark.parametrize("place", PLACES)
def test_a_run_of_refusals_alone_says_who_refused_and_why(measure: Bench, place: str) -> None:
    done = measure(SECOND, f"second:{place}", *LONG)
    assert done.code == 3
    where = f"error: scenario 'decode kv=30', implementation '{SECOND}': "
    assert done.error.startswith(where)
    assert "20 tokens" in done.error
    assert "Leave `" in done.error
    assert refused_cases() == [("decode kv=30", SECOND)]


def test_a_dry_run_says_what_is_refused_before_an_oracle_is_computed(
    measure: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = measure(NAMES, "second:batch", *BOTH, "--dry-run")
    assert done.code == 0
    lines = [line for line in done.err.splitlines() if line.endswith(" refused, skipped")]
    assert len(lines) == 1
    assert lines[0].split()[1:4] == ["decode", "kv=30", SECOND]
    assert f"\ndecode kv=30, {SECOND} will be skipped: fused op 'second' (latent_attention/2) " in done.err
    monkeypatch.setattr(base, "expected_outputs", None)
    assert measure(SECOND, "second:batch", *LONG).code == 3


def test_a_refusal_that_the_plan_did_not_foresee_is_the_same(
    measure: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decode step may have lengths that neither the first nor the last has, and free memory changes."""
    monkeypatch.setattr(fixture.LayerFixture, "refusal", lambda self, name: "")
    assert measure(NAMES, "second:batch", *LONG).code == 0
    assert refused_cases() == [("decode kv=30", SECOND)]
    assert read().cases[0].check.reason.endswith("it takes 20 tokens. Leave `latent_attention=second` out.")


def test_an_op_alone_is_refused_the_same_way(bench: Bench, small: list[str]) -> None:
    words = ["--op", "latent_attention", "--implementations", NAMES, "--runs", "2", "--passes", "2"]
    words += ["-O", "refuse=second:batch", "--kv", "30", "-o", "run.json", "--cache", "warm"]
    backend = ("--backend", "several_ops:SeveralOps")
    assert " refused, skipped\n" in bench(*backend, *small[:2], *words, "--dry-run").err
    done = bench(*backend, *small[:2], *words)
    assert done.code == 0, done.err
    assert [name for _, name in refused_cases()] == [SECOND]
    assert len(read().cases) == 3


def test_an_op_that_fails_is_no_refusal(measure: Bench) -> None:
    done = measure(NAMES, "second:raise", *LONG)
    assert done.code == 3
    assert done.error.startswith("error: scenario 'decode kv=30' failed: RuntimeError: the plan broke (")
    assert done.error.endswith("op 'second' of latent_attention).")


def test_a_backend_that_fails_outside_of_its_ops_ends_the_run(
    measure: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: HostBackend) -> Any:
        raise BackendError("the device is gone.")

    monkeypatch.setattr(HostBackend, "synchronize", broken)
    done = measure(NAMES, "second:call", *LONG)
    assert (done.code, done.error) == (3, "error: the device is gone.")
