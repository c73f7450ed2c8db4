"""Drawn cases: what they find, how little of it is shown, and how long they may take."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mla.conformance import suite
from mla.conformance.cli import main
from mla.conformance.report import CheckResult, decode
from mla.conformance.trial import Drawing
from mla.reference import REFERENCE

Run = Callable[..., list[CheckResult]]
FEW = 12  # draws of a right op: enough to see that it runs, too few to see that it is right


class Rarely(type(REFERENCE["rms_norm"])):  # type: ignore[misc]
    """Wrong where there are more than 40 rows of more than 100 features."""

    def __call__(self, *, x: torch.Tensor, out: torch.Tensor, **rest: Any) -> None:
        super().__call__(x=x, out=out, **rest)
        if x.shape[0] > 40 and x.shape[1] > 100:
            out[-1] += 1


class FirstTime(type(REFERENCE["linear"])):  # type: ignore[misc]
    """Wrong in the first call of a packed weight."""

    def pack(self, weight: torch.Tensor) -> Any:
        self.called = False
        return super().pack(weight)

    def __call__(self, packed: Any, *, out: torch.Tensor, **rest: Any) -> None:
        super().__call__(packed, out=out, **rest)
        out += 0 if self.called else 1
        self.called = True


class Adds(type(REFERENCE["rotate_query"])):  # type: ignore[misc]
    """Adds to what `out` held."""

    def __call__(self, *, out: torch.Tensor, **rest: Any) -> None:
        before = out.clone()
        super().__call__(out=out, **rest)
        out += before


def drawn(judge: Run, backend: Any, kind: str, count: int) -> CheckResult:
    (result,) = judge(backend, f"{kind}.drawn[mine-*]", drawing=Drawing(count))
    return result


@pytest.mark.parametrize("kind", list(REFERENCE))
def test_the_reference_is_right(judge: Run, sound: Any, kind: str) -> None:
    group = kind.removesuffix("_attention")
    (result,) = judge(sound(), f"{group}.drawn[reference-*]", drawing=Drawing(FEW))
    assert (result.status, result.reason) == ("incomplete", f"{FEW} of 300 drawn cases were judged")
    assert result.drawn is not None
    assert (result.drawn.judged, result.drawn.refused, result.drawn.seed) == (FEW, 0, 0)
    assert {"numbers", "calls", "memory"} <= set(result.drawn.along)


def test_the_smallest_wrong_case_is_shown(judge: Run, sound: Any) -> None:
    result = drawn(judge, sound(ops={"mine": Rarely()}), "rms_norm", 300)
    assert result.status == "fail"
    shown = re.match(r"(\d+) tokens, (\d+) features: out: 1 of \1 rows are wrong", result.failures[0].reason)
    assert shown is not None, result.failures[0].reason
    assert 41 <= int(shown[1]) <= 64
    assert 101 <= int(shown[2]) <= 128


@pytest.mark.parametrize(
    ("op", "kind", "said"),
    [
        (FirstTime, "linear", "it is right the second time"),
        (Adds, "rotate_query", "it depends on what the output held before"),
    ],
)
def test_a_wrong_case_says_what_it_is_right_with(
    judge: Run, sound: Any, op: Any, kind: str, said: str
) -> None:
    assert said in drawn(judge, sound(ops={"mine": op()}), kind, 100).failures[0].reason


def test_one_seed_gives_one_sequence(judge: Run, sound: Any) -> None:
    along = [
        judge(sound(), "rms_norm.drawn", drawing=Drawing(count, seed=seed))[0].drawn.along["rows"]  # type: ignore[union-attr]
        for count, seed in ((8, 3), (8, 3), (8, 4))
    ]
    assert along[0] == along[1] != along[2]


def test_without_time_nothing_is_drawn(judge: Run, sound: Any) -> None:
    (result,) = judge(sound(), "rms_norm.drawn")
    assert (result.status, result.reason) == ("refused", "no cases were to be drawn")


def test_too_few_draws_are_incomplete_and_a_kept_failure_comes_first(
    sound: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--backend", "faulty_backend:FaultyBackend", "--only", "rms_norm.drawn", "--dtype", "float32"]
    words += ["-O", "op=rms_norm", "--report", "out.json", "--draws"]
    assert main([*words, "3"]) == 7
    assert "1 incomplete" in capsys.readouterr().out
    monkeypatch.setattr(suite, "ENOUGH", 3)
    assert main([*words, "3"]) == 0
    monkeypatch.setattr("faulty_backend.FaultyBackend.ops", lambda self: {"mine": Rarely()})
    assert main([*words, "300", "--dump-failure", "kept"]) == 4
    assert "the first wrong call is kept" in capsys.readouterr().err
    assert main([*words, "300", "--dump-failure", "kept"]) == 4
    (check,) = decode(Path("out.json").read_bytes()).checks
    assert check.drawn is not None
    assert (check.drawn.judged, check.drawn.kept) == (0, 1)
