"""Ranks that start in a blink: real processes, forked from one that has imported torch and the runner.

`Nursery` starts that process. It is this file run as a program: it reads a JSON line per run, forks the run's
ranks, and writes a line when one is born or has ended.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

# What a rank would import, and where limits that no test looks at are measured: those take no time here.
MODULES = (
    *("torch.distributed", "mla.bench.cli.main", "mla.bench.plan.resolve", "mla.bench.plan.request"),
    *(
        "mla.bench.measure.engine",
        "mla.bench.run.scheduler",
        "mla.bench.run.steering",
        "mla.bench.plan.preview",
    ),
    *("mla.bench.ranks.launch", "mla.bench.ranks.follower", "mla.bench.run.judging", "mla_backend_cpu"),
)
LITTLE: dict[str, dict[str, Any]] = {
    "mla.bench.limits.microbench": {"SIDES": (64, 128)},
    "mla.bench.limits.growth": {"SECONDS": 0.0, "REPEATS": 1},
    "mla.bench.run.judging": {"SECONDS": 0.0},
}


@dataclass
class Ranks:
    """The ranks of one run, with their output in `folder`."""

    nursery: Nursery
    folder: Path
    pids: Sequence[int]

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank, unless it has ended."""
        if self.pids[rank] not in self.nursery.codes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def code(self, rank: int) -> int | None:
        """Return how a rank has ended, minus a signal's number; None while it runs."""
        return self.nursery.codes.get(self.pids[rank])

    def wait(self, seconds: float, ranks: Sequence[int] | None = None) -> list[int | None]:
        """Return the codes of all ranks after these have ended, or after so many seconds."""
        limit = time.monotonic() + seconds
        waited = range(len(self.pids)) if ranks is None else ranks
        while time.monotonic() < limit and any(self.code(rank) is None for rank in waited):
            time.sleep(0.02)
        return [self.code(rank) for rank in range(len(self.pids))]

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
        for rank in range(len(self.pids)):
            self.send(rank, signal.SIGKILL)
        self.wait(10)


class Nursery:
    """The process that ranks are forked from; ended by leaving the `with` block."""

    def __init__(self, path: Sequence[Path] = ()) -> None:
        """`path`: more folders to import from."""
        folders = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH", "")])]
        quiet = {
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }  # as the runner does
        environment = {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(folders)}
        command = [sys.executable, str(Path(__file__).resolve())]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.codes: dict[int, int] = {}
        self._born: list[list[int]] = []
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._thread.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def start(
        self,
        words: Sequence[str],
        folder: Path,
        world: int = 2,
        own: Mapping[int, Sequence[str]] | None = None,
        **environment: str,
    ) -> Ranks:
        """Start a run's ranks in `folder`; `own` has more words for some. MASTER_PORT is a free one."""
        variables = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [
            {
                "words": [*words, *(own or {}).get(rank, ())],
                "environment": {
                    **variables,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    **environment,
                },
                "folder": str(folder),
                "rank": rank,
            }
            for rank in range(int(environment.get("STARTED", world)))
        ]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(ranks) + "\n")
        self._process.stdin.flush()
        with self._news:
            self._news.wait_for(lambda: bool(self._born), timeout=120)
            return Ranks(self, folder, self._born.pop())

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word, *numbers = json.loads(line)
            with self._news:
                if word == "born":
                    self._born.append(numbers)
                    self._news.notify_all()
                else:
                    self.codes[numbers[0]] = numbers[1]


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _prepare() -> None:
    for name in MODULES:
        importlib.import_module(name)
    for name, values in LITTLE.items():
        for attribute, value in values.items():
            setattr(importlib.import_module(name), attribute, value)


def _serve() -> int:
    """Fork what each line asks for until stdin ends; return, in a child, the exit code of its rank."""
    alive: set[int] = set()
    while True:
        alive -= set(_ended(alive))
        if not select.select([0], [], [], 0.02)[0]:
            continue
        line = sys.stdin.readline()
        if not line:
            return 0
        born = []
        for rank in json.loads(line):
            pid = os.fork()
            if not pid:
                return _run(**rank)
            born.append(pid)
        alive |= set(born)
        _say("born", *born)


def _ended(alive: set[int]) -> Iterator[int]:
    for pid in sorted(alive):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            _say("ended", pid, os.waitstatus_to_exitcode(status))
            yield pid


def _say(*words: Any) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


def _run(words: Sequence[str], environment: Mapping[str, str], folder: str, rank: int) -> int:
    """Become a rank."""
    os.environ.update(environment)
    os.chdir(folder)
    streams = (os.devnull, f"out{rank}.txt", f"err{rank}.txt")
    for descriptor, path in enumerate(streams):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC if descriptor else os.O_RDONLY)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["python -m mla.bench", *words]
    from mla.bench.cli.main import main
    from mla.command import console

    code = main(list(words))
    console.close()
    return code


if __name__ == "__main__":
    _prepare()
    sys.exit(_serve())
