"""A fused op that is wrong, refuses or raises never gets a number and never passes unnoticed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla.bench import results

Bench = Callable[..., Any]

WRONG_OP = ("--backend", "fake-wrong-op")


@pytest.fixture
def measure(bench: Bench, small: list[str]) -> Bench:
    """Return `bench` for one scenario on the backend with the faulty op."""

    def measure(fault: str, *words: str, scenario: str = "decode") -> Any:
        options = ["-O", f"fault={fault}", "--scenario", scenario, "-o", "run.json", "-v"]
        return bench(*WRONG_OP, *small, *options, *words, fakes=["wrong_op"])

    return measure


def cases() -> dict[str, results.Case]:
    run = results.decode(Path("run.json").read_bytes())
    return {case.implementation: case for case in run.cases}


@pytest.mark.parametrize("scenario", ["prefill", "decode"])
def test_a_right_fused_op_is_timed_beside_the_reference(measure: Bench, scenario: str) -> None:
    done = measure("none", scenario=scenario)
    assert done.code == 0
    assert "ops        mla: latent_attention=loop\n" in done.err
    assert list(cases()) == ["mla", "mla-reference"]
    assert cases()["mla"].ops["latent_attention"] == "loop"
    assert cases()["mla-reference"].ops["latent_attention"] == "reference"
    assert all(case.latency_ms is not None for case in cases().values())


@pytest.mark.parametrize("scenario", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [("drop", "output rows are too far from the oracle"), ("nan", "hold NaN or infinity")],
)
def test_a_wrong_op_gets_a_reason_and_no_number(
    measure: Bench, fault: str, reason: str, scenario: str
) -> None:
    done = measure(fault, scenario=scenario)
    assert done.code == 4
    assert done.error.startswith("wrong result: 1 case got no number")
    assert reason in done.out
    assert done.out.splitlines()[-1] == f"{scenario.title()}: no number, check: wrong"
    assert " tok/s\n" not in done.out
    wrong, right = cases()["mla"], cases()["mla-reference"]
    assert wrong.check.status == "wrong"
    assert reason in wrong.check.reason
    assert (wrong.latency_ms, wrong.tokens_per_s, wrong.passes) == (None, None, 0)
    assert right.check.status == "ok"
    assert right.latency_ms is not None


def test_wrong_rows_are_red_on_a_terminal(measure: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    row = next(line for line in measure("drop").out.splitlines() if "decode" in line and "wrong" in line)
    assert "\x1b[31m" in row


def test_an_op_that_refuses_the_layer_is_passed_over_with_its_reason(measure: Bench) -> None:
    done = measure("spec", "--list-ops")
    assert done.code == 0
    reason = "  fused op 'loop' not used because it has no kernel for 4 heads"
    lines = done.out.splitlines()
    assert lines[lines.index("latent_attention: reference") + 1] == reason
    assert measure("spec").code == 0
    assert list(cases()) == ["mla"]


@pytest.mark.parametrize("scenario", [(), ("--scenario", "decode")])
def test_an_op_that_raises_is_named_and_earlier_scenarios_are_kept(
    bench: Bench, small: list[str], scenario: tuple[str, ...]
) -> None:
    faulty = (*WRONG_OP, "-O", "fault=raise", "-O", "tokens=2")  # those of decode
    options = ["--warmups", "0", "--implementations", "mla", "-o", "run.json"]
    done = bench(*faulty, *small, *scenario, *options, fakes=["wrong_op"])
    assert done.code == 3
    assert done.error.startswith(
        "error: scenario 'decode' failed: RuntimeError: the device ran out of memory (fake_wrong_op.py:"
    )
    assert "3 lines" not in done.err
    kept = results.decode(Path("run.json").read_bytes()).cases
    assert [case.scenario for case in kept] == ([] if scenario else ["prefill"])
    assert ("Prefill Latency" in done.out) == (not scenario)


def test_an_op_is_blamed_by_its_own_line_and_name_where_torch_raises(bench: Bench, small: list[str]) -> None:
    options = ("-O", "fault=inside", "--implementations", "mla", "--scenario", "decode")
    done = bench(*WRONG_OP, *small, *options, fakes=["wrong_op"])
    assert done.code == 3
    assert re.fullmatch(
        r"error: scenario 'decode' failed: TypeError: layer_norm\(\).* "
        r"\(fake_wrong_op\.py:\d+ in normalized, op 'loop' of latent_attention\)\.",
        done.error,
    )


def test_a_clock_that_stands_still_is_refused(bench: Bench, small: list[str]) -> None:
    done = bench("--backend", "fake-virtual-clock", "-O", "script=0", *small, fakes=["virtual_clock"])
    assert done.code == 3
    assert done.error == "error: the host clock of this backend measured 0.0 ms for a forward."
