"""The run of all kernels in turns: which take part, and what becomes of the options and the time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mla
from benchmarks.gpu import rivals
from benchmarks.gpu.report import in_turns
from mla.bench import results
from mla.errors import UnsupportedOps, UsageError
from mla_backends import FusedOp

HERE = Path(__file__).parents[2] / "benchmarks" / "gpu"

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
    offered: dict[str, FusedOp] = {}
    backend = SimpleNamespace(name="acme", device=torch.device("cpu"), ops=lambda: offered)
    monkeypatch.setattr(mla, "load_backend", lambda name, options: backend)
    return offered


def test_kernels_that_run_here_take_turns_and_the_others_say_why_not(
    ops: dict[str, FusedOp], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = Kernel(), Kernel()
    ops |= {
        "first": first, "old": Kernel("it needs another card"), "broken": Kernel(fails="no compiler"),
        "second": second, "other": Kernel(contract="expanded_attention/1"),
    }  # fmt: skip
    assert rivals.implementations(WORDS) == "mla[latent_attention=first],mla[latent_attention=second]"
    assert capsys.readouterr().err.splitlines() == [
        "old is left out: it needs another card",
        "broken is left out: no compiler",
    ]
    assert first.heads == [16]


@pytest.mark.parametrize(("kind", "heads"), [("sparse_latent_attention", 128), ("select_latents", 64)])
def test_kernels_of_sparse_attention_are_asked_about_their_own_layers(
    ops: dict[str, FusedOp], kind: str, heads: int
) -> None:
    kernel = Kernel(contract=f"{kind}/1")
    ops["kernel"], specs = kernel, []
    kernel.unsupported_reasons = lambda spec: specs.append(spec) or []  # type: ignore[method-assign, func-returns-value]
    words = ["--backend", "acme", "--op", kind, "--config", "deepseek-v3.2"]
    assert rivals.implementations(words) == f"mla[{kind}=kernel]"
    assert [(spec.num_heads, spec.topk) for spec in specs] == [(heads, 2048)]


@pytest.mark.parametrize(("given", "left"), [("90s", "60s"), ("1m", "30s"), ("10s", "1s")])
def test_the_time_that_has_gone_by_is_taken_off_the_budget(given: str, left: str) -> None:
    assert rivals.bench_words(WORDS, "a,b", 30.0) == ["-m", "mla.bench", *WORDS, "--implementations", "a,b"]
    words = rivals.bench_words([*WORDS, "--budget", given], "a,b", 30.0)
    assert words[-4:] == ["--implementations", "a,b", "--budget", left]


def test_without_a_kernel_there_is_no_run(ops: dict[str, FusedOp]) -> None:
    with pytest.raises(UnsupportedOps, match="no kernel of latent_attention runs here: none is offered"):
        rivals.implementations(WORDS)
    ops["old"] = Kernel("it needs another card")
    with pytest.raises(UnsupportedOps, match="old is left out: it needs another card"):
        rivals.implementations(WORDS)


def test_the_command_itself_runs_them_and_writes_the_result(tmp_path: Path) -> None:
    words = ("--backend", "cpu", "--op", "latent_attention", "--config", str(HERE / "smoke.json"))
    shape = ("--batch", "1", "--kv", "8", "--runs", "1", "--passes", "1", "--warmups", "0", "--cache", "warm")
    program, target = HERE / "rivals.py", tmp_path / "x.json"
    done = subprocess.run(
        [sys.executable, str(program), *words, *shape, "-o", str(target)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (case,) = results.read(target).cases
    assert case.implementation == "mla[latent_attention=native_latent_attention]"
    row = dict(zip(in_turns.HEADER, in_turns.rows({"x": results.read(target)}, {})[0], strict=True))
    assert (row["kernel"], row["timed"], row["check"]) == (
        "native_latent_attention",
        "eager, host clock",
        "ok",
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--op", "latent_attention"], "needs --backend NAME"),
        (["--backend", "acme", "--op", "linear"], "sparse_latent_attention, select_latents or no --op"),
        ([*WORDS, "--implementations", "mla"], "leave them out"),
    ],
)
def test_options_it_cannot_use_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        rivals.options_of(words)
