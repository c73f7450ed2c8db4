"""Single cases: counted without running, run alone by id, and left out where time is up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mla.conformance.checks import borders
from mla.conformance.cli import main
from mla.conformance.registry import LAYER, OP
from mla.conformance.report import CheckResult
from mla.conformance.selection import Xfails
from mla.conformance.suite import carry_out, trials
from mla.conformance.trial import BackendUnderTest, Drawing, Trial
from mla.reference import REFERENCE
from mla_backends.api import Packed

Run = Callable[..., list[CheckResult]]
FAULTY = ("--backend", "faulty_backend:FaultyBackend", "-O", "op=rms_norm")


class Counting(type(REFERENCE["linear"])):  # type: ignore[misc]
    """Remembers how many rows each call had."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, packed: Packed, *, x: torch.Tensor, **rest: Any) -> None:
        self.rows.append(len(x))
        super().__call__(packed, x=x, **rest)


def of_ops(subject: BackendUnderTest, *only: str) -> list[Trial]:
    chosen = trials(subject, (torch.float32,), only)
    return [trial for trial in chosen if trial.check.scope in (OP, LAYER)]


def test_cases_are_counted_without_a_call_of_an_op_or_the_oracle(
    sound: Any, right_ops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the time can be estimated, and cases be listed; nor are inputs drawn for what does not run."""

    def touched(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was computed")

    for owner in {type(op) for op in (*right_ops.values(), *REFERENCE.values())}:
        monkeypatch.setattr(owner, "__call__", touched)
        monkeypatch.setattr(owner, "prepare", touched)
        monkeypatch.setattr(owner, "pack", touched)
    monkeypatch.setattr(torch, "randn", touched)
    subject = BackendUnderTest(sound(ops=right_ops), "sound")
    for trial in of_ops(subject):
        counted = replace(trial, chosen=frozenset()).run()
        assert (counted.passed, counted.failures) == (0, []), trial.id
        assert trial.all_labels() or counted.refusals, trial.id


def test_the_cases_that_are_counted_are_those_that_run(sound: Any) -> None:
    subject = BackendUnderTest(sound(), "sound")
    for trial in of_ops(subject, "linear", "latent.tiles", "layer.decode", "rms_norm"):
        labels = trial.all_labels()
        assert trial.run().labels == labels
        assert trial.ran == len(labels), trial.id


@pytest.mark.parametrize(
    ("only", "rows"),
    [
        (("linear.formula[mine-float32]#3",), [130]),
        (("linear.formula[mine-*]#1", "linear.formula[mine-float32]#4"), [1, 5]),
        (("linear.formula[mine-*]#1", "linear.formula[mine-float32]"), [1, 7, 130, 5]),
        (("linear.outlier#2",), [66]),
    ],
)
def test_a_case_runs_alone(judge: Run, sound: Any, only: tuple[str, ...], rows: list[int]) -> None:
    op = Counting()
    results = [verdict for verdict in judge(sound(ops={"mine": op}), *only) if verdict.of == "mine"]
    assert op.rows == rows
    (result,) = results
    assert result.status == "pass"
    assert result.cases.passed == len(set(rows))


def judged_late(sound: Any, op: Any, only: str) -> CheckResult:
    """Return what becomes of a check that begins when its time is up."""
    drawing = Drawing(until=time.monotonic() - 1)
    subject = BackendUnderTest(sound(ops={"mine": op}), "sound", drawing=drawing)
    (trial,) = trials(subject, (torch.float32,), [only])
    return carry_out(trial, Xfails())


def test_a_check_that_is_late_runs_its_first_case(sound: Any) -> None:
    op = Counting()
    late = judged_late(sound, op, "linear.formula[mine-*]")
    assert (late.status, late.cases.passed, late.cases.left_out, late.late, op.rows) == ("pass", 1, 3, 3, [1])
    assert judged_late(sound, op, "linear.formula[mine-*]#3").late == 0
    assert op.rows == [1, 130]


class OnlyBfloat16(Counting):
    def unsupported_reasons(self, spec: Any) -> list[str]:
        return [] if spec.dtype == torch.bfloat16 else ["it computes in bfloat16"]


class Narrow(type(REFERENCE["rms_norm"])):  # type: ignore[misc]
    def unsupported_reasons(self, spec: Any) -> list[str]:
        return [] if spec.features < 100 else ["it serves narrow rows"]


def test_a_check_that_is_late_is_not_refused_by_its_first_cases(sound: Any) -> None:
    """It would claim that the op serves none, of which others were not asked."""
    late = judged_late(sound, Narrow(), "rms_norm.formula[mine-*]")
    assert (late.status, late.cases.passed, late.cases.refused, late.late) == ("pass", 1, 2, 1)


@pytest.mark.parametrize(("words", "late"), [(("--minutes", "1e-6"), True), (("--draws", "1"), False)])
def test_the_card_counts_what_was_left_out_for_time(words: tuple[str, ...], late: bool, capsys: Any) -> None:
    chosen = ("--only", "rms_norm.formula", "--only", "rms_norm.drawn", "--dtype", "float32", "--quick")
    assert main([*FAULTY, *chosen, *words]) in (0, 7)
    printed = capsys.readouterr().out
    said = "- 3 fixed cases of rms_norm: time was up before them (--minutes gives more)."
    assert (said in printed) is late
    assert printed.endswith(" s; 3 fixed cases left out as time was up\n") is late


def test_the_reference_runs_where_no_op_serves_a_kind_or_where_it_is_asked_for_and_draws_come_last(
    sound: Any,
) -> None:
    def ids(*only: str) -> list[str]:
        subject = BackendUnderTest(sound(ops={"mine": OnlyBfloat16()}), "sound")
        return [trial.id for trial in trials(subject, (torch.bfloat16, torch.float32), only)]

    planned = ids("linear", "layer.weights", "rms_norm.grid")
    assert {"rms_norm.grid[reference-float32]", "layer.weights[auto-float32]"} <= {*planned}
    reference = [name for name in planned if "linear" in name and "reference" in name]
    assert reference == planned[-1:] == ["linear.drawn[reference-float32]"], "which no op serves"
    named = ["linear.formula[reference-bfloat16]"]
    assert ids(*named) == named
    assert "layer.weights[reference-float32]" in ids("*[reference-*")


class Foreign(Counting):
    contract = "linear/99"


class Unbuilt(Counting):
    def preflight(self, spec: Any) -> list[str]:
        return ["its compiler is missing"]


class NoBatch(type(REFERENCE["latent_attention"])):  # type: ignore[misc]
    def unsupported_batch(self, *_: Any) -> list[str]:
        return ["it serves no batch"]


@pytest.mark.parametrize(
    ("op", "only", "checked"),
    [
        (Counting, "linear.formula", ["mine"]),
        (Foreign, "linear.formula", ["mine", "reference"]),
        (Unbuilt, "linear.drawn", ["mine", "reference"]),
        (NoBatch, "latent.formula", ["mine", "reference"]),
    ],
)
def test_the_reference_is_checked_where_no_op_serves_a_layer(
    sound: Any, op: Any, only: str, checked: list[str]
) -> None:
    subject = BackendUnderTest(sound(ops={"mine": op()}), "sound")
    assert [trial.of for trial in trials(subject, (torch.float32,), [only])] == checked


def test_cases_are_listed_with_a_backend_alone(capsys: Any) -> None:
    assert main(["--list", "--only", "latent.tiles#3"]) == 2
    assert "'latent.tiles#3' is a case; --list shows cases with --backend alone." in capsys.readouterr().err
    assert main(["--list", "--only", "latent.tiles"]) == 0
    assert "1 check: 1 tiles" in capsys.readouterr().out


def test_a_row_of_many_cases_has_a_short_label() -> None:
    (scene,) = borders.scenes("alive", "latent_attention")
    assert scene.label.startswith("20 cases, the first q 1,2 kv 5,9, ")
    assert scene.label.endswith("; called 40 times; all prepared before")
