"""Several tasks of srun or torchrun: each writes a file of its own, with the right facts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch_variables import SECOND, SetVariables

from mla.bench import results

Bench = Callable[..., Any]
VIRTUAL = ("--backend", "fake-virtual-clock", "--passes", "1", "--scenario", "decode")


def test_each_task_writes_its_own_result_with_what_slurm_said(
    bench: Bench, small: list[str], launched: SetVariables
) -> None:
    launched(**SECOND, SLURM_JWT="secret", SLURM_JOB_USER="somebody")
    done = bench(*VIRTUAL, *small, "-o", "run-%t.json", fakes=["virtual_clock"])
    assert done.code == 0
    assert "device" not in done.err.splitlines()[0], "a backend that counts no devices chooses none"
    text = Path("run-1.json").read_text()
    assert "secret" not in text
    assert "somebody" not in text
    result = results.decode(text.encode())
    facts = {key: value for key, value in result.environment.items() if "slurm" in key}
    assert facts == {name.lower(): value for name, value in SECOND.items()}
    assert all("--device" not in case.repro for case in result.cases)
