"""One opponent, run like any backend: by the command line, in this process, on a layer of four heads."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ceiling_cases import measure_limits_quickly
from opponents.base import CONFIG, Opponent

from mla.bench import results
from mla.bench.cli.main import main

WORKLOAD = """
[[scenario]]
name = "prefill"
mode = "prefill"
query_lens = [16, 8, 24]
history = [32, 0, 16]
runs = 72
passes = 6
warmups = 2

[[scenario]]
name = "decode"
mode = "decode"
query_lens = ["1*8"]
history = ["100*4", "200*4"]
runs = 8
passes = 6
warmups = 2
"""
EAGER = ("--mode", "eager", "--cache", "warm", "--clock", "host")


@dataclass(frozen=True)
class Duel:
    """What became of an opponent's run."""

    code: int
    out: str
    err: str
    run: results.Run

    def case(self, name: str = "mla") -> results.Case:
        """Return the case of an implementation."""
        (duel_case,) = (case for case in self.run.cases if case.implementation == name)
        return duel_case

    @property
    def lost(self) -> bool:
        """Whether the opponent has no number, for a reason that is told."""
        case = self.case()
        numbers = (case.latency_ms, case.tokens_per_s, case.roofline.fraction)
        return case.check.status in ("wrong", "doubtful") and not any(numbers) and bool(case.check.reason)

    @property
    def number_or_percentage_lost(self) -> bool:
        """Whether the opponent has no number, or none beside a limit."""
        return self.lost or self.case().roofline.fraction is None

    @property
    def stands(self) -> bool:
        """Whether the number stands."""
        case = self.case()
        return case.check.status == "ok" and case.latency_ms is not None and self.code == 0

    def __str__(self) -> str:
        case = self.case()
        latency = case.latency_ms and f"{case.latency_ms.median:.3f} ms"
        return f"exit {self.code}, {latency}, {case.check}, {case.roofline}\n{self.out}{self.err}"


Play = Callable[..., Duel]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Products on one thread: tests run beside each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _limits_soon(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take little time for limits, except where they are looked at."""
    if request.path.name != "test_limits.py":
        measure_limits_quickly(monkeypatch)


@pytest.fixture
def play(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Play:
    """Return a function that runs one scenario on an opponent; it undoes what the opponent patched."""
    (tmp_path / "small.json").write_text(json.dumps(CONFIG))
    (tmp_path / "small.toml").write_text(WORKLOAD)
    module = types.ModuleType("opponent_in_play")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def play(
        opponent: Opponent,
        scenario: str = "decode",
        *words: str,
        implementations: str = "mla",
        ways: tuple[str, ...] = EAGER,
    ) -> Duel:
        module.opponent = opponent  # type: ignore[attr-defined]
        what = ["--op", scenario[3:]] if scenario.startswith("op ") else ["--scenario", scenario]
        what += [] if scenario.startswith("op ") else ["--workload", "small.toml", "--attention", "absorbed"]
        kept = tmp_path / "run.json"
        kept.unlink(missing_ok=True)
        capsys.readouterr()
        with opponent.patches:
            code = main(
                [
                    *("--backend", f"{module.__name__}:opponent", "--config", "small.json"),
                    *("--dtype", "float32", "--implementations", implementations, "-o", "run.json"),
                    *what,
                    *ways,
                    *words,
                ]
            )
        out, err = capsys.readouterr()
        run = results.decode(kept.read_bytes()) if kept.exists() else None
        assert run, f"exit {code}\n{out}{err}"
        assert run.cases, f"exit {code}\n{out}{err}"
        return Duel(code, out, err, run)

    return play
