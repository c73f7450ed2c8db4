"""`--dump-failure` of the suite: the call of the first failed check, which `replay` makes again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import faulty_backend
import pytest
import torch

from mla.bench.cli.main import main as bench
from mla.conformance.cli import main
from mla.failures import file
from mla.reference import REFERENCE

FAULTY = ["--backend", "faulty_backend:FaultyBackend", "--dtype", "float32", "--quick"]


@pytest.mark.parametrize(
    ("kind", "fault", "only", "reason"),
    [
        ("latent_attention", "head", "latent.formula", "head 15 of every row"),
        ("latent_attention", "lse", "latent.formula", "lse: "),
        ("write_latent", "stray", "write_latent.grid", "1 slots of the cache have changed"),
        ("linear", "scale", "layer.mixed", "every row"),
    ],
)
def test_the_first_failure_is_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    kind: str,
    fault: str,
    only: str,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["-O", f"op={kind}", "-O", f"fault={fault}", "--only", only, "--dump-failure", "kept"]
    assert main([*FAULTY, *options]) == 4
    said = capsys.readouterr().err
    assert f"{only}[" in said
    assert "the first wrong call is kept in 'kept/failure.safetensors'; replay it with: " in said
    kept = file.read(Path("kept")).document
    assert reason in kept.reason
    assert kept.call is not None
    assert (kept.call.kind, kept.call.op) == (kind, "faulty")
    assert bench(["replay", "kept"]) == 4
    assert bench(["replay", "kept", "--op", "reference"]) == 0
    monkeypatch.setattr(faulty_backend.FaultyBackend, "ops", lambda self: {"faulty": REFERENCE[kind]})
    capsys.readouterr()
    assert bench(["replay", "kept"]) == 0
    assert (
        "did not repeat: the op has changed since: this call was wrong by itself" in capsys.readouterr().err
    )


def test_the_case_that_failed_is_kept_and_not_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The command that is kept with it runs that case alone."""
    monkeypatch.chdir(tmp_path)
    called = faulty_backend.FaultyOp.__call__
    rows: list[int] = []

    def many_rows(self: Any, *leading: Any, x: torch.Tensor, out: torch.Tensor, **rest: Any) -> None:
        rows.append(len(x))
        called(self, *leading, x=x, out=out, **rest)
        if len(x) > 100:
            out[100:] *= 1.05

    monkeypatch.setattr(faulty_backend.FaultyOp, "__call__", many_rows)
    options = ["-O", "op=linear", "--only", "linear.formula", "--dump-failure", "kept"]
    assert main([*FAULTY, *options]) == 4
    assert rows == [1, 7, 130, 5, 130, 130]  # every case, the wrong one again, and its call alone
    origin = file.read(Path("kept")).document.origin
    assert origin.where == "linear.formula[faulty-float32]#3"
    words = shlex.split(origin.command)
    assert words[:3] == ["python", "-m", "mla.conformance"]
    rows.clear()
    capsys.readouterr()
    assert main(words[3:]) == 4
    assert rows == [130]
    assert "1 check: 0 passed, 1 failed" in capsys.readouterr().out


def test_a_call_that_raises_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)

    def illegal(self: Any, *leading: Any, **tensors: Any) -> None:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(faulty_backend.FaultyOp, "__call__", illegal)
    only = ["--only", "rms_norm.formula", "--only", "rms_norm.grid"]  # the first of which counts
    options = ["-O", "op=rms_norm", *only, "--dump-failure", "kept"]
    assert main([*FAULTY, *options]) == 4
    kept = file.read(Path("kept")).document
    assert kept.reason == "it raised RuntimeError: illegal memory access"
    assert kept.origin.where == "rms_norm.formula[faulty-float32]#1"
    capsys.readouterr()
    assert bench(["replay", "kept"]) == 4
    assert "wrong: it raised RuntimeError: illegal memory access" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert bench(["replay", "kept"]) == 0


def test_a_failure_without_a_wrong_call_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The fault is in what the op says of itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("faulty_backend.FaultyOp.unpack", lambda self, packed: packed.data + 1)
    options = ["-O", "op=linear", "--only", "linear.pack", "--dump-failure", "kept"]
    assert main([*FAULTY, *options]) == 4
    assert (
        "--dump-failure kept nothing of linear.pack[faulty-float32]#1: no call of an op"
        in capsys.readouterr().err
    )
    assert list(Path("kept").iterdir()) == []
