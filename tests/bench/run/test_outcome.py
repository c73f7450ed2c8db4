"""Exit codes of a run, from the states of its cases."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from mla.bench import results
from mla.bench.run.scheduler import Outcome, verdict
from mla.bench.terminal.run_table import headlines, render
from mla.command.exit_codes import Exit

MakeRun = Callable[..., results.Run]


@pytest.fixture
def run_of(make_run: MakeRun) -> Callable[..., results.Run]:
    """Return a maker of a run with one case per implementation, in these states."""

    def run_of(**states: str) -> results.Run:
        run = make_run()
        run.cases = []
        for name, status in states.items():
            check = results.Check(status=status, reason=f"it is {status}")  # type: ignore[arg-type]
            none: dict[str, Any] = {} if status == "ok" else {"latency_ms": None, "tokens_per_s": None}
            run.cases += make_run(implementation=name.replace("_", "-"), check=check, **none).cases
        return run

    return run_of


@pytest.mark.parametrize(
    ("states", "code", "said"),
    [
        ({"mla": "ok", "mla_reference": "ok"}, Exit.OK, ()),
        ({"mla": "ok", "transformers": "not run"}, Exit.OK, ()),
        ({"mla": "doubtful", "mla_reference": "ok"}, Exit.DOUBTFUL, ("suspect timing: ",)),
        ({"mla": "ok", "mla_reference": "doubtful"}, Exit.DOUBTFUL, ("suspect timing: ",)),
        ({"mla": "doubtful", "mla_reference": "wrong"}, Exit.WRONG, ("wrong result: ", "suspect")),
        (
            {"mla": "not run", "mla_reference": "ok"},
            Exit.NOTHING_RAN,
            ("mla produced no result; only the baselines did",),
        ),
        (
            {"transformers": "ok", "mla": "not run"},
            Exit.NOTHING_RAN,
            ("mla produced no result; only the baselines did",),
        ),
        ({"mla_reference": "ok", "transformers": "not run"}, Exit.OK, ()),
        ({"mla": "not run"}, Exit.NOTHING_RAN, ()),
    ],
)
def test_the_worst_case_decides(
    run_of: Any, capsys: pytest.CaptureFixture[str], states: dict[str, str], code: Exit, said: tuple[str, ...]
) -> None:
    assert verdict(Outcome(run_of(**states))) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True))


def test_a_doubtful_case_shows_its_reason_and_no_number(run_of: Any) -> None:
    run = run_of(mla="doubtful", mla_reference="ok")
    assert headlines(run) == ["Prefill: no number, check: doubtful"]
    text = render(run, "table")
    assert re.search(r"^prefill +mla +DOUBTFUL$", text, re.MULTILINE)
    assert "\n\nprefill, mla: it is doubtful. Rerun when idle" in text
    assert "| - | doubtful |" in render(run, "md")
    assert ",it is doubtful," in render(run, "csv")
    assert results.decode(render(run, "json").encode()) == run
