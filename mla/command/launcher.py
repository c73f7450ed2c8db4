"""Where this process stands among the tasks that torchrun or Slurm started, and what follows from it.

Each task takes a device of its own and writes a result of its own. torchrun's variables come first: it may
itself be a task of Slurm.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from mla.errors import UsageError

# Variables that number this process on its node, the strongest first.
LOCAL = ("LOCAL_RANK", "SLURM_LOCALID")
# Variables that count the tasks. Not SLURM_NTASKS: a batch script, which is one process, has that as well.
TASKS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
# Letters of Slurm's own file name patterns, and the variables they stand for.
LETTERS = {
    "t": ("RANK", "SLURM_PROCID"),
    "j": ("SLURM_JOB_ID",),
    "s": ("SLURM_STEP_ID",),
    "n": ("SLURM_NODEID",),
    "N": ("SLURMD_NODENAME",),
    "A": ("SLURM_ARRAY_JOB_ID",),
    "a": ("SLURM_ARRAY_TASK_ID",),
}
_MAX_DIGITS = 9  # of a number of tasks; Python refuses to read thousands
_PATTERN = re.compile(rf"%(\d?)([%{''.join(LETTERS)}])")


def result_path(path: Path, shared: bool = False) -> Path:
    """Return the file this task writes: `%t`, `%j` and the others replaced, padded as in `%3t`.

    Raises `UsageError` when a letter stands for nothing here, and when several tasks would write one file,
    unless it is `shared`: one of them writes it.
    """
    text, tasks = str(path), count() or 1
    if not shared and tasks > 1 and "t" not in {letter for _, letter in _PATTERN.findall(text)}:
        raise UsageError(
            f"{tasks} tasks would all write '{text}': put the task's number into the name, as in run-%t.json."
        )
    return Path(_PATTERN.sub(lambda match: _value(text, match[2]).zfill(int(match[1] or 0)), text))


def _value(text: str, letter: str) -> str:
    if letter == "%":
        return letter
    _, value = _first(LETTERS[letter])
    if not value:
        stands = f"%{letter} in '{text}' stands for {' or '.join(LETTERS[letter])}"
        raise UsageError(f"{stands}, but that is not set; write %% for a percent sign.")
    return value


def rank() -> int | None:
    """Return this task's number among all of the launch; None without a launcher. Raises `UsageError`."""
    return _number(LETTERS["t"])


def count() -> int | None:
    """Return the number of tasks of the launch; None without a launcher. Raises `UsageError`."""
    return _number(TASKS)


def local_number() -> int | None:
    """Return this task's number on its node; None where no launcher says. Raises `UsageError`."""
    return _number(LOCAL)


def local_device(note: Callable[[str], None]) -> Callable[[int | None], int | None] | None:
    """Return a function from the number of visible devices to this task's index, for `load_backend`.

    The index is None where the devices cannot be counted. What was chosen is noted. Numbers beyond the
    visible devices start again from 0: with --gpus-per-task=1 every task sees its own device as number 0.
    Returns None without a launcher.
    """

    def choose(number: int, count: int | None) -> int | None:
        if not count:
            return None
        wrapped = f" {number}" if number >= count else ""
        note(f"device {number % count} of {count}, from {_first(LOCAL)[0]}{wrapped}")
        return number % count

    return None if (number := local_number()) is None else partial(choose, number)


def start_words(world: int) -> list[str]:
    """Return what starts as many processes as this one has beside it; torchrun by default.

    With several nodes, torchrun is to be started on each, with its options of a rendezvous.
    """
    if _first(TASKS)[0] == "SLURM_STEP_NUM_TASKS":
        threads = os.environ.get("SLURM_CPUS_PER_TASK")
        return ["srun", "-n", str(world), *([f"--cpus-per-task={threads}"] if threads else []), "python"]
    nodes = _number(("GROUP_WORLD_SIZE",)) or 1
    several = ["--nnodes", str(nodes)] if nodes > 1 else []
    return ["torchrun", *several, "--nproc-per-node", str(world // nodes)]


def is_fact(key: str) -> bool:
    """Return whether `facts` may have said this: it differs between jobs without meaning anything."""
    return key.upper() in _TORCHRUN or key.startswith("slurm")


def facts(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return what the launcher said about this process, from a fixed list of variables: no secrets."""
    return {name.lower(): environment[name] for name in (*_TORCHRUN, *_SLURM) if environment.get(name)}


_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
# Not SLURM_*: that would record user names, hosts' addresses and, on some clusters, a token (SLURM_JWT).
_SLURM = (
    *("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST"),
    *("SLURM_JOB_NUM_NODES", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_STEP_ID", "SLURM_NTASKS"),
    *("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURMD_NODENAME"),
    *("SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "SLURM_CPU_BIND"),
    *("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS"),
    *("SLURM_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND"),
)


def _first(names: tuple[str, ...]) -> tuple[str, str]:
    """Return name and value of the first variable that is set; both are "" if none is."""
    return next(((name, value) for name in names if (value := os.environ.get(name))), ("", ""))


def _number(names: tuple[str, ...]) -> int | None:
    """Return the first variable that is set, as a number. Raises `UsageError` when it is none."""
    name, text = _first(names)
    if name and (not text.isdecimal() or len(text) > _MAX_DIGITS):
        raise UsageError(f"the variable {name} must be a number from 0, got '{text}'.")
    return int(text) if name else None
