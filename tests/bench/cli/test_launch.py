"""Several tasks of srun or torchrun: each writes a file of its own, with the right facts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
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


@pytest.mark.parametrize("variables", [SECOND, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}])
def test_tasks_that_would_overwrite_each_other_are_refused(
    bench: Bench, launched: SetVariables, variables: dict[str, str]
) -> None:
    launched(**variables)
    done = bench("--backend", "cpu", "-o", "run-%%t.json")
    assert (done.code, done.err) == (
        2,
        "error: 2 tasks would all write 'run-%%t.json': put the task's number into the name, as in "
        "run-%t.json.\n",
    )


@pytest.mark.parametrize(
    ("variables", "word", "message"),
    [
        ({}, "run-%t.json", "%t in 'run-%t.json' stands for RANK or SLURM_PROCID, but that is not set; "),
        ({}, "%j.json", "%j in '%j.json' stands for SLURM_JOB_ID, but that is not set; write %% for a "),
        ({"WORLD_SIZE": "two"}, "run.json", "the variable WORLD_SIZE must be a number from 0, got 'two'."),
    ],
)
def test_a_pattern_that_stands_for_nothing_is_refused(
    bench: Bench, launched: SetVariables, variables: dict[str, str], word: str, message: str
) -> None:
    launched(**variables)
    done = bench("--backend", "cpu", "-o", word)
    assert done.code == 2
    assert done.err.startswith(f"error: {message}")
    assert len(done.err.splitlines()) == 1
