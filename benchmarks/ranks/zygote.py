"""The process that ranks are forked from: a program that `Nursery` starts and talks with over pipes.

It has imported what a rank needs. A line on stdin starts a rank, or sends it a signal; a line on stdout says
which process it is, and how it has ended. Ranks have serial numbers: those of processes come again.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# What a rank would import; the second takes seconds, and would come with the first collective.
MODULES = (
    *("torch.distributed", "torch._dynamo", "mla.bench.cli.main", "mla.bench.plan.resolve"),
    *("mla.bench.plan.request", "mla.bench.measure.engine", "mla.bench.run.scheduler"),
    *("mla.bench.run.steering", "mla.bench.plan.preview", "mla.bench.ranks.launch"),
    *("mla.bench.ranks.follower", "mla.bench.run.judging", "mla_backend_cpu"),
)
# Measurements that nothing here looks at take no time: limits, the link, and which of two products is faster.
LITTLE: Mapping[str, Any] = {
    "mla.bench.limits.microbench.SIDES": (64, 128),
    "mla.bench.limits.growth.SECONDS": 0.0,
    "mla.bench.limits.growth.REPEATS": 1,
    "mla.bench.run.judging.SECONDS": 0.0,
    "mla.bench.ranks.link_fit.LARGE": 64 << 10,
    "mla.bench.ranks.link_fit.TIMES": 2,
    "mla_backend_cpu.tuning.fastest": lambda *functions: [1.0] * len(functions),
    "mla_backend_cpu.fp32_linear.fastest": lambda *functions: [1.0] * len(functions),
    "mla.bench.doubts.evidence.ROUNDS": 1,
}
DEATH_OF_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


def prepare() -> None:
    """Import everything, take little time for measurements, and doubt no time: the machine may be busy."""
    for name in MODULES:
        importlib.import_module(name)
    change(LITTLE)
    evidence = importlib.import_module("mla.bench.doubts.evidence")
    change({"mla.bench.doubts.evidence.doubts": _believed(evidence.doubts)})
    gc.collect()
    gc.freeze()  # so that no rank has to look through what it shares


def change(values: Mapping[str, Any]) -> None:
    """Set attributes of modules, by their full names."""
    for name, value in values.items():
        module, _, attribute = name.rpartition(".")
        if not hasattr(importlib.import_module(module), attribute):
            raise AttributeError(f"there is no {name}")
        setattr(importlib.import_module(module), attribute, value)


def _believed(doubts: Callable[..., Any]) -> Callable[..., list[str]]:
    """Return the function without what it finds: it runs forwards, in which all ranks take part.

    A run with the variable DOUBT_TIMES set keeps what it finds.
    """

    @functools.wraps(doubts)
    def believed(*arguments: Any) -> list[str]:
        found: list[str] = doubts(*arguments)
        return found if "DOUBT_TIMES" in os.environ else []

    return believed


class Zygote:
    """Forks ranks and watches them until stdin ends; then nothing is left of them."""

    def __init__(self) -> None:
        self._alive: dict[int, int] = {}  # rank's serial number -> process
        self._read = b""

    def serve(self) -> int:
        """Do what each line asks for; return, in a rank, its exit code."""
        while True:
            self._reap()
            lines = self._lines(0.02 if self._alive else None)
            if lines is None:
                self._end_all()
                os._exit(0)
            for line in lines:
                asked = json.loads(line)
                if "signal" in asked:
                    self._send(**asked)
                elif not (pid := self._fork()):
                    return _become(**asked)
                else:
                    self._alive[asked["serial"]] = pid
                    _say("born", asked["serial"], pid)

    def _lines(self, seconds: float | None) -> list[bytes] | None:
        """Return the lines that have come within so many seconds; None once there will be no more."""
        if not select.select([0], [], [], seconds)[0]:
            return []
        read = os.read(0, 1 << 16)
        *lines, self._read = (self._read + read).split(b"\n")
        return lines if read else None

    def _fork(self) -> int:
        parent, pid = os.getpid(), os.fork()
        if pid:
            return pid
        with contextlib.suppress(OSError, AttributeError):  # not on Linux
            ctypes.CDLL(None).prctl(DEATH_OF_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        return 0

    def _send(self, serial: int, signal: int) -> None:
        if pid := self._alive.get(serial):  # not reaped, so still its own
            os.kill(pid, signal)

    def _reap(self) -> None:
        for serial, pid in list(self._alive.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del self._alive[serial]
                _say("ended", serial, os.waitstatus_to_exitcode(status))

    def _end_all(self) -> None:
        for pid in self._alive.values():
            os.kill(pid, signal.SIGKILL)
        for pid in self._alive.values():
            os.waitpid(pid, 0)


def _say(*words: Any) -> None:
    os.write(1, json.dumps(words).encode() + b"\n")


def _become(
    serial: int,
    words: Sequence[str],
    environment: Mapping[str, str | None],
    folder: str,
    name: str,
    program: str,
    constants: Mapping[str, Any],
    whole_end: bool,
) -> int:
    """Become a rank, whose output goes to files of that name, and return its exit code.

    Without a `whole_end`, what it shares is not taken apart at its end, which would take a second.
    """
    os.chdir(folder)
    for descriptor, path in enumerate((os.devnull, f"out{name}.txt", f"err{name}.txt")):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC if descriptor else os.O_RDONLY)
        os.dup2(opened, descriptor)
        os.close(opened)
    for variable, value in environment.items():
        os.environ.pop(variable, None)
        if value is not None:
            os.environ[variable] = value
    change(constants)
    sys.argv = ["python -m mla.bench", *words]
    module, _, function = program.partition(":")
    main = getattr(importlib.import_module(module), function)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
    code = main(list(words))
    from mla.command import console

    console.close()
    if not whole_end:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        os._exit(code)
    gc.unfreeze()  # or extensions complain that something is left
    return int(code)


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)  # they are for ranks
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    prepare()
    sys.exit(Zygote().serve())
