"""The variables by which srun and torchrun tell a task which one it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mla.command import launcher

# What `srun -n 2` sets for its second task, shortened.
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
