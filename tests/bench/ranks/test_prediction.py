"""The comparison of predictions with real ranks keeps what it has when a run fails."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ranks import prediction
from mla.bench import results
from mla.parallel.layout import Layout


def test_a_layout_that_fails_costs_no_other(
    case: Callable[..., results.Case],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def run(layout: Layout, *_: Any) -> tuple[Path, Path]:
        if layout.dcp > 1:
            raise subprocess.CalledProcessError(5, "python")
        return tmp_path, tmp_path

    def pairs(layout: Layout, *_: Any) -> Iterator[prediction.Pair]:
        yield prediction.Pair(str(layout), 2, case(), case())

    monkeypatch.setattr(prediction, "run", run)
    monkeypatch.setattr(prediction, "pairs", pairs)
    layouts = ("tp=2", "dcp=2", "dp=2")
    assert prediction.main([str(tmp_path), *layouts, "--", "--backend", "cpu"]) == 5
    shown, said = capsys.readouterr()
    assert [line.split("|")[1].strip() for line in shown.splitlines()[2:]] == ["tp=2", "dp=2"]
    assert said == "dcp=2 ended with exit code 5; see above.\n"
