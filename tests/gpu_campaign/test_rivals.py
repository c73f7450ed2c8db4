"""The run of all kernels in turns: which take part, and what becomes of the options and the time."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mla
from benchmarks.gpu import rivals
from mla.errors import UnsupportedOps, UsageError
from mla_backends import FusedOp

WORDS = ["--backend", "acme", "--op", "latent_attention", "--heads", "16", "-a", "batch=1,8", "-o", "x.json"]


class Kernel(FusedOp):
    contract = "latent_attention/1"

    def __init__(self, reason: str = "", fails: str = "", contract: str = contract) -> None:
        self._reasons, self._fails, self.contract = [reason] * bool(reason), fails, contract
        self.heads: list[int] = []

    def unsupported_reasons(self, spec: Any) -> list[str]:
        self.heads.append(spec.num_heads)
        return self._reasons

    def preflight(self, spec: Any) -> list[str]:
        return [self._fails] * bool(self._fails)

    def __call__(self, *arguments: Any, **tensors: Any) -> None: ...


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> dict[str, FusedOp]:
    """Return the ops of the backend that is opened, to be filled in."""
    found: dict[str, FusedOp] = {}
    backend = SimpleNamespace(name="acme", device=torch.device("cpu"), ops=lambda: found)
    monkeypatch.setattr(mla, "load_backend", lambda name, options: backend)
    return found


def test_kernels_that_run_here_take_turns_and_the_others_say_why_not(
    ops: dict[str, FusedOp], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = Kernel(), Kernel()
    ops |= {
        "first": first, "old": Kernel("it needs another card"), "broken": Kernel(fails="no compiler"),
        "second": second, "other": Kernel(contract="expanded_attention/1"),
    }  # fmt: skip
    found = rivals.bench_words(WORDS, time.monotonic())
    assert found == [
        "-m", "mla.bench", *WORDS, "--implementations",
        "mla[latent_attention=first],mla[latent_attention=second]",
    ]  # fmt: skip
    assert capsys.readouterr().err.splitlines() == [
        "old is left out: it needs another card",
        "broken is left out: no compiler",
    ]
    assert first.heads == [16]


def test_the_time_that_has_gone_by_is_taken_off_the_budget(ops: dict[str, FusedOp]) -> None:
    ops["first"] = Kernel()
    words = rivals.bench_words([*WORDS, "--budget", "90s"], time.monotonic() - 30)
    assert words[-2:] == ["--budget", "60s"]
    words = rivals.bench_words([*WORDS, "--budget", "10s"], time.monotonic() - 30)
    assert words[-2:] == ["--budget", "1s"]


def test_without_a_kernel_there_is_no_run(ops: dict[str, FusedOp]) -> None:
    with pytest.raises(UnsupportedOps, match="no kernel of latent_attention runs here: none is offered"):
        rivals.bench_words(WORDS, time.monotonic())
    ops["old"] = Kernel("it needs another card")
    with pytest.raises(UnsupportedOps, match="old is left out: it needs another card"):
        rivals.bench_words(WORDS, time.monotonic())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--op", "latent_attention"], "needs --backend NAME"),
        (["--backend", "acme", "--op", "linear"], "latent_attention or expanded_attention"),
        ([*WORDS, "--implementations", "mla"], "leave them out"),
    ],
)
def test_options_it_cannot_use_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        rivals.options_of(words)
