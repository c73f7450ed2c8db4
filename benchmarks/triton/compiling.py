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

ROOT = Path(__file__).resolve().parents[2]


def compile_cases(cases: Sequence[Case], triton: Path | None = None, jobs: int = 2) -> list[dict[str, Any]]:
    """Return each case's resources, or {"error": why it has none}.

    `triton` is a folder that `pip install --target` has put another version in than is imported here.
    """
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
