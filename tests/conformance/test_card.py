"""What a card says that a run cannot have seen, and how it lists what is wrong."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mla.conformance.card import MOST_CASES, _failures, blind, failed_cases
from mla.conformance.cli import main
from mla.conformance.registry import KINDS, all_checks
from mla.conformance.report import Cases, CheckResult, Failure
from mla.reference import REFERENCE

FAULTY = ("--backend", "faulty_backend:FaultyBackend", "--quick", "--dtype", "float32")


def result(name: str, status: Any = "pass", of: str = "mine", dtype: str = "float32", **changes: Any) -> Any:
    counts = {"passed": 0, "refused": 0, "failed": 0, "left_out": 0, **changes.pop("cases", {"passed": 2})}
    facts = {"reason": "", "failures": [], "refusals": [], "error_ratio": None, "note": "", "seconds": 1.0}
    return CheckResult(
        id=f"{name}[{of}-{dtype}]",
        check=name,
        kind={check.id: check.fails for check in all_checks()}[name],
        of=of,
        dtype=dtype,
        status=status,
        cases=Cases(**counts),
        **{**facts, **changes},
    )


def unseen(results: Any, **changes: Any) -> list[str]:
    facts = {"claimed": ("bfloat16", "float32"), "asked": ("bfloat16", "float32"), "planned": len(results)}
    return list(blind(results, **{**facts, **changes}))


@pytest.mark.parametrize(("left", "said"), [(0, "its one case"), (3, "the one case that ran")])
def test_a_single_wrong_case_is_not_said_to_be_all_there_are(left: int, said: str) -> None:
    failures = [Failure("linear.formula[mine-float32]#1", "1 token", "it is wrong")]
    wrong = result("linear.formula", "fail", cases={"failed": 1, "left_out": left}, failures=failures)
    (line,) = _failures(SimpleNamespace(checks=[wrong], alone=[]))  # type: ignore[arg-type]
    assert line.startswith(f"`linear.formula[mine-float32]`: {said}\n")


QUICK = "What more draws would find: --quick has few of them."
SPARED = "The reference on the device, where an op serves most layers (--only '*[reference-*' runs it)."
ALWAYS = len(unseen([result("linear.formula")]))
assert SPARED in unseen([result("linear.formula")])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"quick": True}, QUICK),
        ({"only": ("linear", "*.product")}, "What other checks ask: only linear, *.product ran."),
        ({"planned": 9}, "What 8 of 9 checks ask: the run ended before them."),
        ({"asked": ("float32",)}, "bfloat16: claimed, and not asked for."),
    ],
)
def test_a_run_that_was_cut_says_so(changes: dict[str, Any], sentence: str) -> None:
    said = unseen([result("linear.formula")], **changes)
    assert sentence in said
    assert len(said) == ALWAYS + (SPARED in said)  # in place of which a choice is named


def test_what_an_op_refused_as_a_whole_is_unseen() -> None:
    of = {"a": "mine", "b": "other"}
    results = [
        result("latent.tiles", "refused", of["a"]),
        result("latent.tiles", "refused", of["a"]),
        result("latent.formula", "pass", of["a"]),
        *(result("linear.formula", "refused", op, "bfloat16") for op in of.values()),
        result("linear.formula", "pass", of["b"], "float32"),
        result("layer.mixed", "refused", of["b"], "float32"),
    ]
    said = unseen(results)
    assert "What fails by tiles in float32 of mine: all of it was refused." in said
    assert "Anything in bfloat16 of mine, other: all of it was refused." in said
    assert len(said) == ALWAYS + 2


def test_how_far_an_index_got_is_said() -> None:
    results = [
        result("latent.far_pages", note="4.3 GB from the start"),
        result("linear.formula", note="unrelated"),
        result("expanded.far_rows", "refused", note="8.6 GB from first to last", cases={"refused": 1}),
    ]
    assert "Indices beyond what latent.far_pages reached: 4.3 GB from the start." in unseen(results)
    assert not any("8.6 GB" in sentence for sentence in unseen(results)), "it was refused"


def test_the_card_and_the_report_say_what_was_not_seen(tmp_path: Path, capsys: Any) -> None:
    words = (
        "-O",
        "op=rms_norm",
        "--only",
        "rms_norm",
        "--draws",
        "300",
        "--report",
        str(tmp_path / "out.json"),
    )
    assert main([*FAULTY, *words]) == 0
    card, report = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_bytes())
    assert len(report["checks"]) == 4
    assert all(f"- {sentence}\n" in card for sentence in report["blind"])
    assert report["blind"][0] == "What other checks ask: only rms_norm ran."
    assert "bfloat16 and float16: claimed, and not asked for." in report["blind"]
    assert {check["kind"] for check in report["checks"]} <= set(KINDS)


def test_a_card_lists_a_few_wrong_cases_and_counts_the_others() -> None:
    ids = [f"linear.formula[mine]#{number}" for number in range(1, 10)]
    failures = [Failure(id=id, case="1 rows", reason="wrong | here") for id in ids]
    lines = failed_cases(result("linear.formula", "fail", failures=failures, cases={"failed": 9}))
    assert lines[0] == "`linear.formula[mine]#1`: 1 rows: wrong \\| here"
    assert lines[MOST_CASES:] == ["and 4 more"]
    assert len(failed_cases(result("linear.formula", "fail", failures=failures[:MOST_CASES]))) == MOST_CASES


def test_the_command_on_the_card_runs_the_first_wrong_case_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    rows: list[int] = []

    class Large(type(REFERENCE["rms_norm"])):  # type: ignore[misc]
        def __call__(self, *, x: torch.Tensor, out: torch.Tensor, **rest: Any) -> None:
            super().__call__(x=x, out=out, **rest)
            rows.append(len(x))
            if len(x) == 70:
                out *= 1.1

    monkeypatch.setattr("faulty_backend.FaultyBackend.ops", lambda self: {"large": Large()})
    options = ("-O", "op=rms_norm", "--threads", "1", "--only", "rms_norm.formula", "--xfails", "/dev/null")
    assert main([*FAULTY, *options]) == 4
    (line,) = (row for row in capsys.readouterr().out.splitlines() if "  - the first alone: `" in row)
    words = shlex.split(line.split("`")[1])
    assert words[-2:] == ["--only", "rms_norm.formula[large-float32]#2"]
    rows.clear()
    assert main(words[3:]) == 4
    assert rows == [70]
    assert "1 check: 0 passed, 1 failed" in capsys.readouterr().out


def test_the_list_with_a_backend_has_every_case(capsys: Any) -> None:
    chosen = ("-O", "op=rms_norm", "--only", "rms_norm.formula", "--only", "device.probe")
    assert main([*FAULTY, "--list", *chosen]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "device.probe (contract)" in lines
    first = lines.index("rms_norm.formula[faulty-float32] (formula)")
    assert lines[first + 1] == "  rms_norm.formula[faulty-float32]#1  1 tokens, 1536 features"
    assert lines[-1] == "2 checks, 5 cases"
    assert main([*FAULTY, "--list", "-O", "op=rms_norm", "--only", "rms_norm.formula[faulty-float32]#4"]) == 0
    assert [line[:37] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "  rms_norm.formula[faulty-float32]#4 ",
        "1 checks, 1 cases",
    ]
