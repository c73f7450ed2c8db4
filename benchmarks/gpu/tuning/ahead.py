"""Compile what sweeps will launch before they do: many kernels at a time, into Triton's cache on disk.

Launches are recorded on the host and go the JIT's own way as far as the cache. Each compilation has a process
of its own, because compilers abort and hang.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

from benchmarks.gpu.tuning import problems
from benchmarks.gpu.tuning.classes import TileClass
from benchmarks.triton.recording import Launch, Recorder
from mla.command import console
from mla_backends.errors import describe, one_line
from mla_backends.triton_ops import Tuning, triton_ops

KERNEL_SECONDS = 100
FORKED = multiprocessing.get_context("fork")  # launches hold what cannot be sent to another process


def launches(classes: Iterable[TileClass]) -> list[Launch]:
    """Return what tiles and changed tiles launch. Lengths change no kernel, so that few tokens do."""
    by_key: dict[str, Launch] = {}
    for tuned in classes:
        few = [replace(shape, batch=2, keys=min(shape.keys, shape.queries + 1024)) for shape in tuned.shapes]
        drawn = [problems.of_shape(tuned.kind, shape, "cpu") for shape in few]
        changed = [replace(tile, halves=False) for tile in tuned.tiles if {"halves": False} in tuned.changes]
        for tile in (*tuned.tiles, *changed):
            recorder = Recorder()
            op = triton_ops(Tuning({1: tile}, {1: tile}), None, recorder)[tuned.op]
            for problem in drawn:
                problem.bound(op).call()
            by_key |= {named(launch): launch for launch in recorder.recorded}
    return list(by_key.values())


def named(launch: Launch) -> str:
    """Return a launch's kernel and what it is compiled for, as text."""
    constants = [f"{name} {value}" for name, value in launch.arguments.items() if name.isupper()]
    kernel = launch.kernel.fn.__name__
    return f"{kernel}: {', '.join(constants)}, {launch.warps} warps, {launch.stages} stages"


def compile_all(wanted: Iterable[Launch], jobs: int, left: Callable[[], float]) -> tuple[int, int]:
    """Compile while there are seconds left. Return how many kernels compiled, and how many did not."""
    waiting, codes = list(wanted), []
    running: dict[Any, tuple[Any, Launch]] = {}  # a process by what is waited for
    while running or (waiting and left() > 1):
        if waiting and len(running) < jobs and left() > 1:
            launch, seconds = waiting.pop(0), max(1, int(min(KERNEL_SECONDS, left())))
            process = FORKED.Process(target=_compile, args=(launch, seconds), daemon=True)
            process.start()
            running[process.sentinel] = process, launch
            continue
        for sentinel in wait(running):
            process, launch = running.pop(sentinel)
            process.join()
            codes.append(code := process.exitcode)
            if code < 0:  # it could not say so itself
                console.note(f"{named(launch)}: its compiler ended by {signal.Signals(-code).name}")
    return codes.count(0), len(codes) - codes.count(0)


def _compile(launch: Launch, seconds: int) -> None:
    """Compile in this process, which an alarm ends."""
    signal.alarm(seconds)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    try:
        launch.kernel.warmup(grid=launch.grid, **launch.arguments, **options)
    except Exception as error:  # noqa: BLE001  # compilers raise anything
        console.note(f"{named(launch)}: {one_line(describe(error))[:200]}")
        sys.exit(1)
