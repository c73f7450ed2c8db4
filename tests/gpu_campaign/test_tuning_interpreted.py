"""The sweep itself with the project's own kernels, interpreted: every tile is compared with the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from triton_here import needs_triton

from benchmarks.gpu.tuning import trials
from benchmarks.gpu.tuning.classes import classes

HERE = Path(__file__).parents[2] / "benchmarks" / "gpu"

KERNELS = Path(__file__).parents[1] / "triton"


@needs_triton
def test_tiles_of_interpreted_kernels_are_right_and_get_a_time(tmp_path: Path) -> None:
    target = tmp_path / "latent-16.json"
    done = subprocess.run(
        [
            sys.executable, str(HERE / "tune.py"), "sweep", "latent-16",
            "--backend", "interpreted:mla_backend", "--smoke", "--out", str(target),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(KERNELS)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sweep, tuned = trials.read(target), classes(smoke=True)["latent-16"]
    assert [trial.fault for trial in sweep.trials] == [""] * len(sweep.trials)
    assert {trial.tile for trial in sweep.ranked()} == {*tuned.tiles, *tuned.finalists(tuned.tiles)}
    assert sweep.facts["card"] == "interpreted"
    assert "of 7 tried and 0 left out" in done.stdout
