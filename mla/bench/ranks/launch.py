"""From a launcher's processes to the ranks of a run, which meet at MASTER_ADDR:MASTER_PORT as in torch's env://."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from mla.bench.ranks.crew import Crew, blamed_on
from mla.bench.ranks.pulse import LOOK, SILENT, Pulse
from mla.command import console, last_words, launcher
from mla.errors import MLAError, RanksError, UsageError
from mla.text import numbered
from mla_backends.errors import describe

if TYPE_CHECKING:
    from mla.bench.plan.options import RunOptions
    from mla.command.options import OpenedBackend
    from mla.parallel.layout import Layout

# Seconds that ranks wait for each other, that one which ends early waits for rank 0, and for a connection.
MEETING, WORD, TRY = 120.0, 20.0, 10.0

FREE_PORT = "set MASTER_PORT to a free port on all ranks"

_TCPStore: Any = vars(dist)["TCPStore"]  # whose stubs do not export them
_PrefixStore: Any = vars(dist)["PrefixStore"]
_JOINED: list[tuple[Pulse, Any]] = []  # what `connect` returned, which lives as long as this process
_unreached = False  # `connect` has waited in vain


def join(options: RunOptions, opened: OpenedBackend, layout: Layout) -> Crew:
    """Meet the other ranks and initialize torch.distributed: gloo on the host, and the device's library.

    Raises `UsageError` for a wrong number of processes, and `RanksError`.
    """
    check_launch(layout)
    library, device = opened.backend.collectives(), opened.backend.device
    if library is None:
        raise RanksError(
            f"backend '{opened.name}' has no collectives (Backend.collectives()), so it cannot "
            "run on several ranks",
            common=True,
        )
    pulse, store = connect(MEETING)
    pulse.start()
    meet(pulse, MEETING)
    kind = "cpu" if device is None else device.type
    with blamed_on(pulse):
        dist.init_process_group(
            "cpu:gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{library}",
            store=store,
            rank=pulse.rank,
            world_size=pulse.world,
            timeout=timedelta(seconds=max(MEETING, options.hang_after)),
        )
    return Crew(layout, library, options.hang_after, pulse)


def connect(seconds: float, unheard: RanksError | None = None) -> tuple[Pulse, Any]:
    """Return the pulse and the store of this rank, which waits so long for rank 0. Raises `RanksError`.

    `unheard`: why this rank ends, if it has come to say so. The store is held by rank 0 or, under torchrun,
    by the launcher. It waits for nobody else, so it is known who never comes.
    """
    rank, world, (host, port) = launcher.rank() or 0, launcher.count() or 1, address()
    holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # nothing is left of the last
    silent = RanksError(f"rank 0 (at {host}:{port}) does not answer: stopped, or its node is gone")
    watch = threading.Timer(seconds + SILENT, die, (unheard or silent,))  # a store waits without limit
    watch.daemon = True
    watch.start()
    limit, until = timedelta(seconds=seconds), time.monotonic() + seconds
    try:
        if not holds:  # torch would write a page of warnings, and not hear Ctrl-C
            _await(partial(_listens, host, port), until)
        store, beats = (
            _PrefixStore(
                f"mla/{attempt}",
                _TCPStore(host, port, world, master, limit, wait_for_workers=False, multi_tenant=True),
            )
            for master in (holds, False)
        )
        enter(beats, rank, world, seconds)
        _JOINED.append((Pulse(rank, world, beats, die), store))
    except Exception as error:
        global _unreached
        _unreached = True
        if isinstance(error, RanksError):
            raise
        sentence = (
            f"rank 0 was not reached at {host}:{port} within {seconds:.0f} s: it has not started, or it has "
            "ended, or MASTER_ADDR or MASTER_PORT is wrong"
        )
        if holds:
            taken = f"rank 0 cannot listen at port {port} ({describe(error)}): another run may use it"
            sentence = f"{taken}; {FREE_PORT}"
        raise RanksError(sentence) from error
    finally:
        watch.cancel()
    return _JOINED[0]


def _listens(host: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((host, port), TRY).close()
        return True
    return False


def _await(condition: Callable[[], object], until: float) -> None:
    """Return once the condition holds. Raises `TimeoutError` at that time of the monotonic clock."""
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(LOOK)


def enter(store: Any, rank: int, world: int, seconds: float) -> None:
    """Take this rank's place, unless the store is another run's, which must not notice.

    Raises `RanksError` then, and if rank 0 has not come after so long: torchrun makes the store before it.
    """
    if rank == 0:
        for key in ("verdict", *map("beat/{}".format, range(world))):
            store.set(key, "")
        store.set("world", str(world))
    try:
        _await(partial(store.check, ["world"]), time.monotonic() + seconds)
    except TimeoutError:
        sentence = f"rank 0 did not join within {seconds:.0f} s: check the output there"
        raise RanksError(sentence) from None
    if (expected := int(store.get("world"))) != world:
        raise RanksError(f"another run, of {expected} ranks, uses this port: {FREE_PORT}")
    if store.add(f"joined/{rank}", 1) > 1:
        raise RanksError(f"another run has a rank {rank} at this port: {FREE_PORT}")


def meet(pulse: Pulse, seconds: float) -> None:
    """Return once all ranks are here; rank 0 waits for so long. Raises `RanksError`."""
    until = time.monotonic() + seconds
    while len(pulse.beats) < pulse.world and (pulse.rank or time.monotonic() < until):
        if pulse.over.wait(LOOK):
            break
    if pulse.lost:
        raise pulse.lost
    if missing := [rank for rank in range(pulse.world) if rank not in pulse.beats]:
        raise RanksError(
            f"{numbered('rank', missing)} did not join within {seconds:.0f} s: check the output there, and "
            f"that {socket.gethostname()} can be reached from there"
        )


def die(lost: RanksError) -> None:
    """End this process, whatever it waits for."""
    with contextlib.suppress(Exception):
        console.complain(str(lost), lost.common)
        sys.stderr.flush()
        last_words.dismiss(lost.exit_code)
    os._exit(lost.exit_code)


def leave_word(sentence: str, code: int) -> bool:
    """Tell other ranks why this one ends, unless they know; return whether they may hear it."""
    if (launcher.count() or 1) == 1 or _unreached:
        return False
    try:
        pulse, _ = _JOINED[0] if _JOINED else connect(WORD, RanksError(sentence, code))
    except MLAError:
        return False
    pulse.leave(sentence.rstrip("."), code)
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
