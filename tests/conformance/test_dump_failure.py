"""`--dump-failure` of the suite: the call of the first failed check, which `replay` makes again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mla.bench.cli.main import main as bench
from mla.conformance.cli import main
from mla.failures import file

FAULTY = ["--backend", "faulty_backend:FaultyBackend", "--dtype", "float32", "--quick"]


@pytest.mark.parametrize(
    ("kind", "fault", "only", "reason"),
    [
        ("latent_attention", "head", "latent.decode", "head 15 of every row"),
        ("latent_attention", "lse", "latent.lse", "lse: "),
        ("write_latent", "stray", "write_latent.untouched", "1 slots of the cache have changed"),
        ("linear", "scale", "layer.history", "every row"),
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


def test_a_failure_without_a_wrong_call_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The fault is in what the op says of itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("faulty_backend.FaultyOp.unpack", lambda self, packed: packed.data + 1)
    options = ["-O", "op=linear", "--only", "linear.pack", "--dump-failure", "kept"]
    assert main([*FAULTY, *options]) == 4
    assert (
        "--dump-failure kept nothing of linear.pack[faulty-float32]: no call of an op"
        in capsys.readouterr().err
    )
    assert list(Path("kept").iterdir()) == []
