"""`Pulse`: which ranks are alive, and why one is not. Over a store of its own, apart from any collective.

A process that is killed says nothing, and what a library raises then names no rank. So every rank writes a
beat that the others watch, and one that fails leaves its reason. A rank that waits in a library which does
not notice that another one is gone is ended by this thread.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
import torch.distributed as dist

from mla.errors import MLAError

# Seconds between beats; without one for SILENT a rank is gone. A process that is not there on this host is
# gone at once. Then this rank has GRACE to notice by itself, and to write what it has.
BEAT, SILENT, GRACE = 0.5, 20.0, 10.0


_TCPStore: Any = vars(dist)["TCPStore"]  # whose stubs do not export it


class RankLost(MLAError):
    """Another rank is gone, or has failed."""

    exit_code = 3


class Member(msgspec.Struct, frozen=True):
    """Where a rank runs."""

    host: str
    pid: int


class Ended(msgspec.Struct, frozen=True):
    """Why a rank has ended, and its exit code."""

    reason: str
    code: int


def this_process() -> Member:
    """Return where this process runs."""
    return Member(socket.gethostname(), os.getpid())


@dataclass(frozen=True)
class Meeting:
    """The address of the store that rank 0 holds."""

    host: str
    port: int


def open_store(world: int) -> tuple[Any, Meeting]:
    """Open the store on rank 0, at any free port."""
    store = _TCPStore("0.0.0.0", 0, world, is_master=True, wait_for_workers=False)
    return store, Meeting(os.environ.get("MASTER_ADDR", "127.0.0.1"), store.port)


class Pulse:
    """Beats for this rank, and watches the others, until it is closed.

    `die` ends the process with a sentence.
    """

    def __init__(
        self,
        rank: int,
        members: Sequence[Member],
        meeting: Meeting,
        die: Callable[[str, int], None],
        served: Any = None,
    ) -> None:
        """`served`: the store itself, which must live as long as the run, on rank 0."""
        self._rank, self._members, self._meeting, self._die = rank, members, meeting, die
        self._served, self._store = served, self._connect()
        self._seen = {other: (b"", time.monotonic()) for other in range(len(members)) if other != rank}
        self._lost: tuple[str, int] | None = None
        self._news, self._closed = threading.Condition(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def _connect(self) -> Any:
        limit = timedelta(seconds=SILENT)
        return _TCPStore(self._meeting.host, self._meeting.port, timeout=limit, wait_for_workers=False)

    def end(self, reason: str, code: int) -> None:
        """Tell the others why this rank ends; nothing if that is not possible any more."""
        with contextlib.suppress(Exception):  # the store went with rank 0
            self._connect().set(f"ended/{self._rank}", msgspec.json.encode(Ended(reason, code)))

    def close(self) -> None:
        """Stop beating and watching."""
        self._closed.set()
        self._thread.join()

    def lost(self, error: BaseException) -> RankLost | None:
        """Return which rank is to blame for an error in a collective, once that is known; None if none is."""
        with self._news:
            self._news.wait_for(lambda: self._lost is not None, timeout=SILENT + 2 * BEAT)
        if self._lost is None:
            return None
        reason, code = self._lost
        found = RankLost(reason)
        found.exit_code = code
        return found

    def _run(self) -> None:
        beat = 0
        while not self._closed.wait(BEAT):
            beat += 1
            try:
                self._store.set(f"beat/{self._rank}", str(beat))
                found = next(filter(None, map(self._look, self._seen)), None)
            except Exception:  # noqa: BLE001  # the store is gone, and with it rank 0
                found = (self._name(0) + " is gone, and with it the run", 3)
            if found is not None:
                self._tell(found)
                return

    def _tell(self, found: tuple[str, int]) -> None:
        with self._news:
            self._lost = found
            self._news.notify_all()
        if not self._closed.wait(GRACE):
            self._die(*found)

    def _look(self, other: int) -> tuple[str, int] | None:
        """Return why another rank is lost, and the exit code that follows; None while it is not."""
        key = f"ended/{other}"
        if self._store.check([key]):
            ended = msgspec.json.decode(self._store.get(key), type=Ended)
            return f"{self._name(other)} ended: {ended.reason}", ended.code
        key, now = f"beat/{other}", time.monotonic()
        beat = self._store.get(key) if self._store.check([key]) else b""
        if beat != self._seen[other][0]:
            self._seen[other] = (beat, now)
        member = self._members[other]
        if member.host == self._members[self._rank].host and not _exists(member.pid):
            return f"{self._name(other)} is gone: it was killed, perhaps for want of memory", 3
        if now - self._seen[other][1] > SILENT:
            return f"{self._name(other)} has not been heard of for {SILENT:.0f} s: it or its node is gone", 3
        return None

    def _name(self, rank: int) -> str:
        member = self._members[rank]
        return f"rank {rank} (process {member.pid} on {member.host})"


def _exists(pid: int) -> bool:
    """Return whether a process of this host runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return not os.path.isdir("/proc/self")  # where there is no /proc, it counts as running
    except OSError:
        return True


def die(sentence: str, code: int) -> None:
    """End this process, whatever it waits for."""
    sys.stderr.write(f"error: {sentence}.\n")
    sys.stderr.flush()
    os._exit(code)
