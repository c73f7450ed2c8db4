"""Compile what sweeps will launch before they do: many kernels at a time, into Triton's cache on disk.

Launches are recorded on the host and go the JIT's own way as far as the cache. Each compilation has a process
of its own, because compilers abort and hang.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec

from benchmarks.gpu.tuning import problems
from benchmarks.gpu.tuning.classes import TileClass
from benchmarks.triton.recording import Launch, Recorder
from mla.command import console
from mla.errors import UnsupportedOps
from mla_backends.errors import describe, one_line
from mla_backends.triton_ops import Tuning, triton_ops

SECONDS = 100  # of one kernel, or enough for one check


def launches(classes: Iterable[TileClass]) -> list[Launch]:
    """Return what tiles and changed tiles launch. Lengths change no kernel, so that few tokens do."""
    found: dict[str, Launch] = {}
    for tuned in classes:
        few = [replace(one, batch=2, keys=min(one.keys, one.queries + 1024)) for one in tuned.shapes]
        drawn = [problems.of_shape(tuned.kind, shape, "cpu") for shape in few]
        changed = [replace(tile, halves=False) for tile in tuned.tiles if {"halves": False} in tuned.changes]
        for tile in (*tuned.tiles, *changed):
            recorder = Recorder()
            op = triton_ops(Tuning({1: tile}, {1: tile}), None, recorder)[tuned.op]
            for problem in drawn:
                problem.bound(op).call()
            found |= {named(launch): launch for launch in recorder.recorded}
    return list(found.values())


def named(launch: Launch) -> str:
    """Return a launch's kernel and what it is compiled for, as text."""
    constants = [f"{name} {value}" for name, value in launch.arguments.items() if name.isupper()]
    kernel = launch.kernel.fn.__name__
    return f"{kernel}: {', '.join(constants)}, {launch.warps} warps, {launch.stages} stages"


def compile_all(wanted: list[Launch], jobs: int, left: Callable[[], float]) -> tuple[int, int]:
    """Compile while there are seconds left. Return how many kernels compiled, and how many did not."""
    _check_forkable()
    waiting, codes = list(wanted), []
    running: dict[int, Launch] = {}
    while running or (waiting and left() > 1):
        if waiting and len(running) < jobs and left() > 1:
            launch = waiting.pop(0)
            running[_start(launch, max(1, int(min(SECONDS, left()))))] = launch
            continue
        for process, code in _ended(running):
            launch = running.pop(process)
            codes.append(code)
            if code < 0:  # it could not say so itself
                console.note(f"{named(launch)}: its compiler ended by {signal.Signals(-code).name}")
    return codes.count(0), len(codes) - codes.count(0)


def _check_forkable() -> None:
    """Raise `UnsupportedOps` where a forked process could not ask the device what to compile for."""
    import torch

    if torch.cuda.is_initialized():
        raise UnsupportedOps(
            "this process has set up CUDA already, which no process that it forks can use: "
            "compile in a new process, before anything is put on a device."
        )


def _ended(running: Iterable[int]) -> list[tuple[int, int]]:
    """Wait until some of these processes have ended, and no others; return their exit codes."""
    while True:
        waited = [os.waitpid(process, os.WNOHANG) for process in running]
        if ended := [(process, os.waitstatus_to_exitcode(status)) for process, status in waited if process]:
            return ended
        time.sleep(0.02)


def checks(smoke: bool) -> list[str]:
    """Return the checks that are run ahead: those of latent attention, or two that launch nothing."""
    from mla.conformance.registry import all_checks

    group = "device." if smoke else "latent."
    found = sorted({one.id for one in all_checks() if one.id.startswith(group)})
    return found[:2] if smoke else found


def read_names(path: Path) -> list[str]:
    """Return the checks that have ended in earlier rounds."""
    return msgspec.json.decode(path.read_bytes(), type=list[str]) if path.exists() else []


def run_checks(names: Iterable[str], backend: str, jobs: int, left: Callable[[], float]) -> dict[str, int]:
    """Run checks, a process for each, while there are seconds left. Return the codes of those that ended."""
    words = (sys.executable, "-m", "mla.conformance", "--backend", backend, "--quick", "--dtype", "bfloat16")

    def code(name: str) -> int | None:
        if (seconds := left()) <= 1:
            return None
        try:
            command = [*words, "--only", name]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return None  # its compilers go with the step
        return done.returncode

    every = list(names)
    with ThreadPoolExecutor(jobs) as pool:
        codes = dict(zip(every, pool.map(code, every), strict=True))
    return {name: code for name, code in codes.items() if code is not None}


def _start(launch: Launch, seconds: int) -> int:
    """Compile in a process of its own, which an alarm ends; return its number."""
    if process := os.fork():
        return process
    try:
        signal.alarm(seconds)
        options = {"num_warps": launch.warps, "num_stages": launch.stages}
        launch.kernel.warmup(grid=launch.grid, **launch.arguments, **options)
        os._exit(0)
    except Exception as error:  # noqa: BLE001  # compilers raise anything
        console.note(f"{named(launch)}: {one_line(describe(error))[:200]}")
    finally:
        os._exit(1)
