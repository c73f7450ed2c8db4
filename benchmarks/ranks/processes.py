"""Ranks that start in a blink: real processes, forked from one that has imported torch and the runner."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

MAIN = "mla.bench.cli.main:main"
# What a rank would import; the second takes seconds, and would come with the first collective.
MODULES = [
    *("torch.distributed", "torch._dynamo", "mla.bench.cli.main", "mla.bench.plan.resolve"),
    *("mla.bench.plan.request", "mla.bench.measure.engine", "mla.bench.run.scheduler"),
    *("mla.bench.run.steering", "mla.bench.plan.request", "mla.bench.ranks.launch"),
    *("mla.bench.run.scenario_run", "mla_backend_cpu"),
]
# Measurements that nothing here looks at take no time: limits, the link, and which of two products is faster.
FAST_PARTS: Mapping[str, Any] = {
    "mla.bench.limits.microbench.SIDES": (64, 128),
    "mla.bench.limits.microbench.REPEAT_S": 0.0,
    "mla.bench.limits.microbench.REPEATS": 1,
    "mla.bench.ranks.crew.LINK_BYTES": (32 << 10, 64 << 10),
    "mla.bench.ranks.crew.LINK_TIMES": 2,
    "mla_backend_cpu.products.product_gain": lambda kernels, fp32: 1.0,
    "mla_backend_cpu.products.fastest": lambda *functions: [1.0] * len(functions),
    "mla.bench.measure.evidence.ROUNDS": 1,
}


@dataclass
class Ranks:
    """The ranks of one run, with their output in `folder`."""

    folder: Path
    processes: Sequence[BaseProcess]

    @property
    def pids(self) -> list[int]:
        """Their processes."""
        return [process.pid or 0 for process in self.processes]

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank, unless it has ended."""
        if self.code(rank) is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def code(self, rank: int) -> int | None:
        """Return how a rank has ended, minus a signal's number; None while it runs."""
        return self.processes[rank].exitcode

    def wait(self, seconds: float, ranks: Sequence[int] | None = None) -> list[int | None]:
        """Return the codes of all ranks after these have ended, or after so many seconds."""
        limit = time.monotonic() + seconds
        waited = range(len(self.processes)) if ranks is None else ranks
        while time.monotonic() < limit and any(self.code(rank) is None for rank in waited):
            time.sleep(0.02)
        return [process.exitcode for process in self.processes]

    def out(self, rank: int = 0) -> str:
        """Return what a rank has printed on stdout."""
        return self._said(f"out{rank}.txt")

    def err(self, rank: int = 0) -> str:
        """Return what a rank has printed on stderr."""
        return self._said(f"err{rank}.txt")

    def _said(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def end(self) -> None:
        """Kill what still runs, stopped or not."""
        for process in self.processes:
            process.kill()
            process.join(10)


def prepare(path: Sequence[Path] = ()) -> None:
    """Start the process that ranks are forked from; `path` has more folders to import from."""
    folders = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    changes = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": os.pathsep.join(folders)}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        forkserver.set_forkserver_preload(MODULES)
        forkserver.ensure_running()
    finally:
        _set(before)


def start(
    words: Sequence[str],
    folder: Path,
    world: int = 2,
    rank_words: Mapping[int, Sequence[str]] | None = None,
    folders: Mapping[int, Path] | None = None,
    program: str = MAIN,
    constants: Mapping[str, Any] | None = None,
    **environment: str | None,
) -> Ranks:
    """Start a run's ranks in `folder`, or in others of `folders`; `rank_words` has more words for some.

    Each calls `program` ("module:function") with its words. `constants` are attributes of modules, by their
    full names. Variables of the environment that are None are not set, and "{rank}" in others is the rank;
    MASTER_PORT is a free one.
    """
    variables: dict[str, str | None] = {"WORLD_SIZE": str(world), "RANK": "{rank}", "LOCAL_RANK": "{rank}"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment}
    processes = []
    for rank in range(world):
        given = [*words, *(rank_words or {}).get(rank, ())]
        named = {name: text and text.replace("{rank}", str(rank)) for name, text in variables.items()}
        where = str((folders or {}).get(rank, folder))
        processes.append(
            multiprocessing.get_context("forkserver").Process(
                target=_become, args=(rank, given, named, where, program, dict(constants or {}))
            )
        )
        processes[-1].start()
    return Ranks(folder, processes)


def _become(
    rank: int,
    words: list[str],
    environment: Mapping[str, str | None],
    folder: str,
    program: str,
    constants: Mapping[str, Any],
) -> None:
    """Become a rank, whose output goes to files with its number, and end as it does."""
    gc.freeze()  # a rank need not look through what it shares
    os.chdir(folder)
    for descriptor, path in enumerate((os.devnull, f"out{rank}.txt", f"err{rank}.txt")):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC if descriptor else os.O_RDONLY)
        os.dup2(opened, descriptor)
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    _set(environment)
    evidence = importlib.import_module("mla.bench.measure.evidence")
    believed = {"mla.bench.measure.evidence.doubts": _believed(evidence.doubts)}
    for name, value in {**FAST_PARTS, **believed, **constants}.items():
        module, _, attribute = name.rpartition(".")
        if not hasattr(importlib.import_module(module), attribute):
            raise AttributeError(f"there is no {name}")
        setattr(importlib.import_module(module), attribute, value)
    sys.argv = ["python -m mla.bench", *words]
    module, _, function = program.partition(":")
    code = getattr(importlib.import_module(module), function)(words)
    importlib.import_module("mla.command.console").close()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    os._exit(code)


def _believed(doubts: Callable[..., Any]) -> Callable[..., list[str]]:
    """Return the function without what it finds, as the machine may be busy; it runs forwards on all ranks.

    A run with the variable DOUBT_TIMES set keeps what it finds.
    """

    @functools.wraps(doubts)
    def believed(*arguments: Any) -> list[str]:
        reasons = list(doubts(*arguments))
        return reasons if "DOUBT_TIMES" in os.environ else []

    return believed


def _set(environment: Mapping[str, str | None]) -> None:
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def free_port() -> int:
    """Return a port that nobody listens at, and that no system gives to those who connect to others."""
    while True:
        port = random.SystemRandom().randrange(10000, 20000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
