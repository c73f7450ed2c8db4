"""What a task of srun or torchrun is told: the name of its file and its device."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch_variables import SECOND, SetVariables

from mla.command import launcher
from mla.errors import UsageError


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


def test_a_batch_script_is_one_process_whatever_the_job_asks_for(launched: SetVariables) -> None:
    """As sbatch -n 2 sets it: the number of tasks that srun would start, and task 0."""
    launched(SLURM_JOB_ID="17", SLURM_NTASKS="2", SLURM_PROCID="0", SLURM_LOCALID="0")
    assert launcher.result_path(Path("run-%j.json")) == Path("run-17.json")


@pytest.mark.parametrize(
    ("variables", "word", "message"),
    [
        ({}, "run-%t.json", "%t in 'run-%t.json' stands for RANK or SLURM_PROCID, but that is not set; "),
        ({}, "%j.json", "%j in '%j.json' stands for SLURM_JOB_ID, but that is not set; write %% for a "),
        ({"WORLD_SIZE": "two"}, "run.json", "the variable WORLD_SIZE must be a number from 0, got 'two'."),
        (
            SECOND,
            "run-%%t.json",
            "2 tasks would all write 'run-%%t.json': put the task's number into the name",
        ),
    ],
)
def test_a_name_that_no_task_can_write_is_refused(
    launched: SetVariables, variables: dict[str, str], word: str, message: str
) -> None:
    launched(**variables)
    with pytest.raises(UsageError) as refused:
        launcher.result_path(Path(word))
    assert str(refused.value).startswith(message)


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


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "torchrun --nproc-per-node 8"),
        ({"WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1"}, "torchrun --nproc-per-node 8"),
        ({"WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}, "torchrun --nnodes 2 --nproc-per-node 4"),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_CPUS_PER_TASK": "3"}, "srun -n 8 --cpus-per-task=3 python"),
        ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, "torchrun --nproc-per-node 8"),
    ],
)
def test_ranks_are_started_again_as_they_were(
    launched: SetVariables, variables: dict[str, str], words: str
) -> None:
    launched(**variables)
    assert launcher.start_words(8) == words.split()
