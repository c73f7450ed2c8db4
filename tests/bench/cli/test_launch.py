"""Several tasks of srun or torchrun: a file, a device and the right facts for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla.bench import results
from mla.command import launcher

Bench = Callable[..., Any]

VIRTUAL = ("--backend", "fake-virtual-clock", "--passes", "1", "--scenario", "decode")
#: What `srun -n 2` sets for its second task, shortened.
SECOND = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURMD_NODENAME": "n01",
}
SetVariables = Callable[..., None]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> SetVariables:
    """Return a function that sets exactly these of the launchers' variables."""
    for name in (*launcher.LOCAL, *launcher.TASKS, *launcher._TORCHRUN, *launcher._SLURM):
        monkeypatch.delenv(name, raising=False)

    def launched(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launched


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("run-%t.json", "run-1.json"),
        ("%j/%N-%n-%s-%3t.json", "17/n01-0-0-001.json"),
        ("100%%-%t.json", "100%-1.json"),
        ("%t-%d.json", "1-%d.json"),
    ],
)
def test_slurms_own_patterns_name_the_file_of_a_task(launched: SetVariables, written: str, path: str) -> None:
    launched(**SECOND)
    assert launcher.result_path(Path(written)) == Path(path)


def test_torchruns_rank_counts_more_than_slurms_task(launched: SetVariables) -> None:
    launched(**SECOND, RANK="6", WORLD_SIZE="8", LOCAL_RANK="2")
    assert launcher.result_path(Path("run-%t.json")) == Path("run-6.json")
    assert launcher.local_number() == 2


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
    found = results.decode(text.encode())
    facts = {key: value for key, value in found.environment.items() if "slurm" in key}
    assert facts == {name.lower(): value for name, value in SECOND.items()}
    assert all("--device" not in case.repro for case in found.cases)


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


def test_a_batch_script_is_one_process_whatever_the_job_asks_for(launched: SetVariables) -> None:
    """As sbatch -n 2 sets it: the number of tasks that srun would start, and task 0."""
    launched(SLURM_JOB_ID="17", SLURM_NTASKS="2", SLURM_PROCID="0", SLURM_LOCALID="0")
    assert launcher.result_path(Path("run-%j.json")) == Path("run-17.json")


@pytest.mark.parametrize(
    ("variables", "word", "message"),
    [
        ({}, "run-%t.json", "%t in 'run-%t.json' stands for RANK or SLURM_PROCID, which is not set here; "),
        ({}, "%j.json", "%j in '%j.json' stands for SLURM_JOB_ID, which is not set here; a percent sign is "),
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


@pytest.mark.parametrize(
    ("variables", "count", "index", "said"),
    [
        ({"SLURM_LOCALID": "1"}, 4, 1, ["device 1 of 4, from SLURM_LOCALID"]),
        ({"SLURM_LOCALID": "3"}, 1, 0, ["device 0 of 1, from SLURM_LOCALID 3"]),
        ({"SLURM_LOCALID": "0"}, 1, 0, ["device 0 of 1, from SLURM_LOCALID"]),
        ({"LOCAL_RANK": "2", "SLURM_LOCALID": "0"}, 4, 2, ["device 2 of 4, from LOCAL_RANK"]),
        ({"SLURM_LOCALID": "1"}, None, None, []),
        ({"SLURM_LOCALID": "1"}, 0, None, []),
    ],
)
def test_the_local_number_chooses_among_the_visible_devices(
    launched: SetVariables, variables: dict[str, str], count: int | None, index: int | None, said: list[str]
) -> None:
    launched(**variables)
    notes: list[str] = []
    choose = launcher.local_device(notes.append)
    assert choose is not None
    assert choose(count) == index
    assert notes == said


def test_without_a_launcher_nothing_is_chosen(launched: SetVariables) -> None:
    launched()
    assert launcher.local_device(lambda said: None) is None
