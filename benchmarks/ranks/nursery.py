"""Ranks that start in a blink: real processes, forked from one that has imported torch and the runner."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

BIRTH = 120.0  # seconds: far more than torch takes to load
MAIN = "mla.bench.cli.main:main"


class NurseryGone(Exception):
    """The process that ranks are forked from has ended, and its ranks with it."""


@dataclass
class Ranks:
    """The ranks of one run, with their output in `folder`."""

    nursery: Nursery
    folder: Path
    serials: Sequence[int]
    pids: Sequence[int]

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank, unless it has ended."""
        self.nursery.ask(serial=self.serials[rank], signal=number)

    def code(self, rank: int) -> int | None:
        """Return how a rank has ended, minus a signal's number; None while it runs."""
        return self.nursery.code(self.serials[rank])

    def wait(self, seconds: float, ranks: Sequence[int] | None = None) -> list[int | None]:
        """Return the codes of all ranks after these have ended, or after so many seconds."""
        limit = time.monotonic() + seconds
        waited = range(len(self.serials)) if ranks is None else ranks
        while time.monotonic() < limit and any(self.code(rank) is None for rank in waited):
            time.sleep(0.02)
        return [self.code(rank) for rank in range(len(self.serials))]

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
        with contextlib.suppress(NurseryGone):  # and they with it
            for rank in range(len(self.serials)):
                self.send(rank, signal.SIGKILL)
            self.wait(10)


class Nursery:
    """The process that ranks are forked from (`zygote.py`); ended by leaving the `with` block.

    Should something else end it, its ranks end as well, and the next run gets a new one.
    """

    def __init__(self, path: Sequence[Path] = (), whole_end: bool = False) -> None:
        """`path`: more folders to import from. `whole_end`: ranks end as Python does: a second each."""
        self._whole_end = whole_end
        folders = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH", "")])]
        quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # as the runner does
        self._environment = {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(folders)}
        self._news = threading.Condition()
        self._serials = itertools.count()
        self._pids: dict[int, int] = {}
        self._codes: dict[int, int] = {}
        self._first = 0  # serial number in this zygote
        self._begin()

    def _begin(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("zygote.py"))]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, env=self._environment, stdin=pipe, stdout=pipe, text=True, start_new_session=True
        )  # a signal to all that was started from a terminal, or by a test, is not for it
        self._thread = threading.Thread(target=self._listen, args=(self._process,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> int:
        """End the process and return its exit code."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        code = self._process.wait()
        self._thread.join()
        self._process.stdout.close()
        return code

    def start(
        self,
        words: Sequence[str],
        folder: Path,
        world: int = 2,
        own: Mapping[int, Sequence[str]] | None = None,
        folders: Mapping[int, Path] | None = None,
        program: str = MAIN,
        constants: Mapping[str, Any] | None = None,
        **environment: str | None,
    ) -> Ranks:
        """Start a run's ranks in `folder`, or in others of `folders`; `own` has more words for some.

        Each calls `program` ("module:function") with its words. `constants` are attributes of modules, by
        their full names. Variables of the environment that are None are not set, and "{rank}" in others is
        the rank; MASTER_PORT is a free one.
        """
        if self._process.poll() is not None:
            self._close()
            self._first = next(self._serials)
            self._begin()
        variables: dict[str, str | None] = {
            "WORLD_SIZE": str(world),
            "RANK": "{rank}",
            "LOCAL_RANK": "{rank}",
        }
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment}
        serials = []
        for rank in range(world):
            serials.append(next(self._serials))
            own_variables = {
                name: text and text.replace("{rank}", str(rank)) for name, text in variables.items()
            }
            self.ask(
                serial=serials[-1],
                words=[*words, *(own or {}).get(rank, ())],
                environment=own_variables,
                folder=str((folders or {}).get(rank, folder)),
                name=str(rank),
                program=program,
                constants=dict(constants or {}),
                whole_end=self._whole_end,
            )
        return Ranks(self, folder, serials, [self._born(serial) for serial in serials])

    def ask(self, **wish: Any) -> None:
        """Have the process do something. Raises NurseryGone where it is gone."""
        assert self._process.stdin is not None
        try:
            os.write(self._process.stdin.fileno(), json.dumps(wish).encode() + b"\n")
        except BrokenPipeError as error:
            raise self._gone() from error

    def code(self, serial: int) -> int | None:
        """Return how a rank has ended; None while it runs. Raises NurseryGone where nobody can know."""
        if serial not in self._codes and (serial < self._first or self._process.poll() is not None):
            raise self._gone()
        return self._codes.get(serial)

    def _born(self, serial: int) -> int:
        with self._news:
            self._news.wait_for(
                lambda: serial in self._pids or self._process.poll() is not None, timeout=BIRTH
            )
        if serial not in self._pids:
            raise self._gone()
        return self._pids[serial]

    def _gone(self) -> NurseryGone:
        how = self._process.poll()
        return NurseryGone(
            f"the process that ranks are forked from does not answer within {BIRTH:.0f} s"
            if how is None
            else f"the process that ranks are forked from has ended with {how}"
        )

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            word, serial, number = json.loads(line)
            with self._news:
                (self._pids if word == "born" else self._codes)[serial] = number
                self._news.notify_all()
        with self._news:
            self._news.notify_all()


def free_port() -> int:
    """Return a port that nobody listens at, and that no system gives to those who connect to others."""
    while True:
        port = random.SystemRandom().randrange(10000, 20000)
        with socket.socket() as found:
            try:
                found.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
