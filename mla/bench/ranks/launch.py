"""From a launcher's processes to ranks that know each other and agree on what they run."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

import mla
from mla.bench.ranks.crew import Crew
from mla.command import launcher
from mla.errors import MLAError, UsageError
from mla_backends.errors import describe

if TYPE_CHECKING:
    from mla.bench.plan.options import RunOptions
    from mla.command.backend import OpenedBackend
    from mla.parallel.layout import Layout

# Seconds that ranks wait for each other at the start.
MEETING = 120
# Options that may differ between ranks: rank 0 writes, each has a device of its own.
_OWN = ("device", "output", "resume", "baseline", "profile", "dump_failure")


class RanksError(MLAError):
    """Ranks that do not find each other, or do not agree."""

    exit_code = 3


def join(options: RunOptions, opened: OpenedBackend, layout: Layout) -> Crew:
    """Meet the other ranks. Raises `UsageError` for a wrong number of processes, and `RanksError`."""
    check_launch(layout)
    library = opened.backend.collectives()
    if library is None:
        raise RanksError(
            f"backend '{opened.name}' names no library for collectives (Backend.collectives()), so it cannot "
            "run on several ranks."
        )
    _meet(opened, library, options.hang_after)
    crew = Crew(layout, library, options.hang_after)
    _agree(crew.share(_facts(options, opened)))
    crew.watch()
    return crew


def check_launch(layout: Layout) -> None:
    """Raise `UsageError` unless as many processes were started as the layout has ranks."""
    count = launcher.count()
    if count == layout.world or (count is None and layout.world == 1):
        return
    started = f"{count} were started" if count else "one was started"
    raise UsageError(
        f"--parallel {layout} needs {layout.world} processes, and {started}: `torchrun --nproc-per-node "
        f"{layout.world} -m mla.bench ...` or `srun -n {layout.world} python -m mla.bench ...`."
    )


def _meet(opened: OpenedBackend, library: str, timeout: float) -> None:
    """Initialize torch.distributed: gloo for what is on the host, the device's library for the rest."""
    kind = "cpu" if opened.backend.device is None else opened.backend.device.type
    libraries = "cpu:gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{library}"
    for name, value in _rendezvous().items():
        os.environ.setdefault(name, value)
    try:
        dist.init_process_group(libraries, timeout=timedelta(seconds=max(MEETING, timeout)))
        dist.barrier()
    except Exception as error:
        raise RanksError(f"the ranks did not find each other: {describe(error)}.") from error


def _rendezvous() -> Mapping[str, str]:
    """Return the variables that torch wants, of a process that Slurm or nobody started."""
    job, step = os.environ.get("SLURM_JOB_ID", "0"), os.environ.get("SLURM_STEP_ID", "0")
    number = 64 * int(job) + int(step) if job.isdecimal() and step.isdecimal() else 0
    found = {
        "RANK": str(launcher.rank() or 0),
        "WORLD_SIZE": str(launcher.count() or 1),
        "MASTER_PORT": str(20000 + number % 20000),
    }
    nodes = os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES") or "1"
    if nodes == "1":
        found["MASTER_ADDR"] = "127.0.0.1"
    elif "MASTER_ADDR" not in os.environ:
        raise UsageError(
            "ranks on several nodes need MASTER_ADDR, the name of the first node: "
            "`export MASTER_ADDR=$(scontrol show hostnames | head -n 1)` before srun."
        )
    return found


def _facts(options: RunOptions, opened: OpenedBackend) -> dict[str, str]:
    """Return what must be the same on all ranks, by the word for it."""
    given = {f"--{name.replace('_', '-')}": str(value) for name, value in asdict(options).items()}
    for name in _OWN:
        given.pop(f"--{name.replace('_', '-')}", None)
    versions = {"mla": mla.__version__, "torch": torch.__version__, "Python": platform.python_version()}
    return {**given, **versions, f"the version of '{opened.name}'": str(opened.version)}


def _agree(facts: Sequence[Mapping[str, str]]) -> None:
    """Raise `RanksError`, on all ranks, where one was asked for something else than rank 0."""
    for rank, found in enumerate(facts):
        for name, value in found.items():
            if value != facts[0].get(name):
                raise RanksError(
                    f"rank {rank} has {name} {value}, and rank 0 has {facts[0].get(name)}: all ranks must be "
                    "started with the same options and versions."
                )
