"""From a launcher's processes to ranks that know each other and agree on what they run."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

import mla
from mla.bench.ranks.crew import Crew
from mla.bench.ranks.errors import RankLost, RanksError, silent
from mla.bench.ranks.meeting import MEETING, THREADS, WORD, Meeting, agree
from mla.bench.ranks.pulse import SILENT, Member, Pulse, blamed_on, die
from mla.bench.ranks.store_watch import StoreWatch
from mla.command import launcher
from mla.errors import MLAError, UsageError

if TYPE_CHECKING:
    from mla.bench.plan.options import RunOptions
    from mla.command.backend import OpenedBackend
    from mla.parallel.layout import Layout

# Options that may differ between ranks: rank 0 writes, each has a device of its own.
_OWN = ("device", "output", "resume", "baseline", "profile", "dump_failure")


def join(options: RunOptions, opened: OpenedBackend, layout: Layout) -> Crew:
    """Meet the other ranks.

    Raises `UsageError` for a wrong number of processes, `RanksError` and `RankLost`.
    """
    check_launch(layout)
    library = opened.backend.collectives()
    if library is None:
        raise RanksError(
            f"backend '{opened.name}' names no library for collectives (Backend.collectives()), so it cannot "
            "run on several ranks.",
            common=True,
        )
    rank, world = launcher.rank() or 0, launcher.count() or 1
    meeting, members, store = _meet(rank, world, _facts(options, opened))
    pulse = Pulse(rank, members, store, die)
    with blamed_on(pulse):
        _initialize(meeting, opened, library, options.hang_after)
    return Crew(layout, library, options.hang_after, meeting, pulse)


def _meet(rank: int, world: int, facts: Mapping[str, str]) -> tuple[Meeting, list[Member], Any]:
    """Return once all ranks are there and have the same facts. Raises `RanksError` and `RankLost`.

    The last is a connection to the store.
    """
    host, port = address()
    unanswered = RankLost(silent([f"rank 0 (at {host}:{port})"], SILENT), 3)
    with StoreWatch(SILENT, partial(die, unanswered)) as watch:
        meeting = Meeting(rank, world, (host, port), answered=watch.answered)
        meeting.claim()
        _MEETING.append(meeting)
        arrivals = meeting.arrive(facts)
        store = meeting.client()
    try:
        agree([arrival.facts for arrival in arrivals])
    except RanksError:  # all ranks find the same
        meeting.linger()
        raise
    return meeting, [arrival.member for arrival in arrivals], store


_MEETING: list[Meeting] = []  # of this process, once it is its rank


def leave_word(sentence: str, code: int) -> bool:
    """Tell other ranks why this one ends, unless they know; return whether they may hear it.

    Rank 0 has the store, so it waits a moment for those that have none either.
    """
    rank, world = launcher.rank() or 0, launcher.count() or 1
    if world == 1:
        return False
    try:
        if not _MEETING:
            meeting = Meeting(rank, world, address(), WORD)
            meeting.claim()
            _MEETING.append(meeting)
        _MEETING[0].leave(sentence.rstrip("."), code)
    except MLAError:
        return False
    return True


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


def _initialize(meeting: Meeting, opened: OpenedBackend, library: str, timeout: float) -> None:
    """Initialize torch.distributed: gloo for what is on the host, the device's library for the rest."""
    kind = "cpu" if opened.backend.device is None else opened.backend.device.type
    libraries = "cpu:gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{library}"
    dist.init_process_group(
        libraries,
        store=meeting.client(),
        rank=meeting.rank,
        world_size=meeting.world,
        timeout=timedelta(seconds=max(MEETING, timeout)),
    )
    dist.barrier()


def address() -> tuple[str, int]:
    """Return host and port of the store: given, or on Slurm's only node. Raises `UsageError`."""
    job, step = os.environ.get("SLURM_JOB_ID", "0"), os.environ.get("SLURM_STEP_ID", "0")
    number = 64 * int(job) + int(step) if job.isdecimal() and step.isdecimal() else 0
    port = os.environ.get("MASTER_PORT") or str(20000 + number % 10000)  # below those that systems hand out
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UsageError(f"the variable MASTER_PORT must be a port, got '{port}'.")
    nodes = os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES") or "1"
    host = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if nodes == "1" else "")
    if not host:
        raise UsageError(
            "ranks on several nodes need MASTER_ADDR, the name of the first node: "
            "`export MASTER_ADDR=$(scontrol show hostnames | head -n 1)` before srun."
        )
    return host, int(port)


def _facts(options: RunOptions, opened: OpenedBackend) -> dict[str, str]:
    """Return what must be the same on all ranks, by the word for it."""
    given = {f"--{name.replace('_', '-')}": str(value) for name, value in asdict(options).items()}
    for name in _OWN:
        given.pop(f"--{name.replace('_', '-')}", None)
    versions = {"mla": mla.__version__, "torch": str(torch.__version__), "Python": platform.python_version()}
    on_host = opened.backend.device is None or opened.backend.device.type == "cpu"
    threads = {THREADS: str(torch.get_num_threads())} if on_host else {}  # else no result counts them
    return {**given, **versions, f"the version of '{opened.name}'": str(opened.version), **threads}
