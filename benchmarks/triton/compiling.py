"""Cases to what they need of a GPU, by any version of Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.triton.cases import Case
from benchmarks.triton.fingerprint import fingerprint_of

ROOT = Path(__file__).resolve().parents[2]
BATCH = 16  # cases between which answers are kept, per compiler at a time


def compile_cases(cases: Sequence[Case], triton: Path | None = None, jobs: int = 2) -> list[dict[str, Any]]:
    """Return each case's resources, or {"error": why it has none}.

    `triton` is a folder that `pip install --target` has put another version in than is imported here. There
    answers are kept by what they depend on, and are not asked for again.
    """
    if triton is None:
        return _compiled(cases, None, jobs)
    files = [triton / "answers" / fingerprint_of(case) for case in cases]
    waiting = list({file: case for case, file in zip(cases, files, strict=True) if not file.exists()}.items())
    failed: dict[Path, dict[str, Any]] = {}  # which may be of a machine that is busy
    for start in range(0, len(waiting), BATCH * jobs):
        batch = waiting[start : start + BATCH * jobs]
        answers = _compiled([case for _, case in batch], triton, jobs)
        for (file, _), answer in zip(batch, answers, strict=True):
            if "error" in answer:
                failed[file] = answer
            else:
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps(answer), encoding="utf-8")
    return [failed[file] if file in failed else json.loads(file.read_text("utf-8")) for file in files]


def _compiled(cases: Sequence[Case], triton: Path | None, jobs: int) -> list[dict[str, Any]]:
    """Return the answers of a process that imports the Triton in a folder."""
    folders = (triton, ROOT, ROOT / "backends", os.environ.get("PYTHONPATH"))
    path = os.pathsep.join(str(folder) for folder in folders if folder)
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.triton.worker", str(jobs)],
        input="\n".join(case.to_json() for case in cases),
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in run.stdout.splitlines()]
