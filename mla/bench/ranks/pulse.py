"""`Pulse`: which ranks are alive, and why one is not, by beats in the store of `torch.distributed`.

A launcher ends the others as well when one is gone, but says neither which case was lost nor why; a library
may wait for ever, so a thread ends the process then. A rank that computes for minutes beats on.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from mla.errors import MLAError
from mla_backends.errors import describe

# Seconds between beats, and between looks while ranks still join; after SILENT without a beat a rank is lost.
# GRACE: for this rank to notice by itself, and to write what it has. WORD: to be heard by the others.
BEAT, LOOK, SILENT, GRACE, WORD = 0.5, 0.05, 20.0, 8.0, 5.0
MAX_NAMED = 8  # ranks that a sentence names
BYE = b"bye"  # the last beat of a rank that ends well, or knows why the run ends
FREE_PORT = "set MASTER_PORT to a free port on all ranks"


class RanksError(MLAError):
    """Ranks that do not find each other, do not agree, or are lost."""

    def __init__(self, sentence: str, code: int = 3, common: bool = False) -> None:
        """`common`: every rank meets it, or has been told, and rank 0 says it for all."""
        super().__init__(f"{sentence.rstrip('.')}.")
        self.exit_code, self.common = code, common


def listed(names: Sequence[str]) -> str:
    """Return "a, b and c"; of many, the first and how many more there are."""
    if len(names) > MAX_NAMED:
        names = [*names[:MAX_NAMED], f"{len(names) - MAX_NAMED} more"]
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def numbered(ranks: Sequence[int]) -> str:
    """Return "rank 1" or "ranks 1, 2 and 3"."""
    return f"rank{'s' * (len(ranks) > 1)} {listed(list(map(str, ranks)))}"


class Member(NamedTuple):
    """Where a rank runs."""

    host: str
    pid: int


class Verdict(NamedTuple):
    """Why a run ends, and the exit code; `said`: by the rank that ends first, for all."""

    reason: str
    code: int = 3
    said: bool = True


class Pulse:
    """Beats for this rank in the run's store, and watches the others, until it is closed.

    The first verdict in the store ends the run on all ranks. `die` must end the process: GRACE after that, if
    this has not been closed by then.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        store: Any,
        die: Callable[[RanksError], None],
        word: str = "",
        code: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """`store`: a client of its own, since an operation of another thread may wait.

        `word`, `code`: of a rank that has come to say why it ends. `seconds`: the wait for rank 0. Raises
        `RanksError` without it, and where the store is another run's.
        """
        self.rank, self.world, self.die = rank, world, die
        self.members = {rank: Member(socket.gethostname(), os.getpid())}
        self.place: Callable[[], int] = int  # how far this rank is: the more, the farther
        self.limit = SILENT  # seconds without a beat
        self._store, self._turns = store, 0
        self._word = self._said(word, code) if word else None  # yet to be said
        self._lost: RanksError | None = None
        self._beats: dict[int, bytes] = {}  # the last of each rank
        self._quiet: dict[int, float] = {}  # seconds since, as far as this process was running
        self._changed, self._closed = threading.Condition(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._enter(seconds)
        self._beat()  # with the word, before the others can believe that all goes well
        store.set(f"member/{rank}", msgspec.json.encode(self.members[rank]))
        self._thread.start()
        threading.Thread(target=self._watch_store, name="pulse of the store", daemon=True).start()

    def _enter(self, seconds: float) -> None:
        """Take this rank's place, unless the store is another run's, which must not notice."""
        limit = time.monotonic() + seconds
        while self.rank and not self._store.check(["world"]):  # torchrun makes the store before rank 0
            if time.monotonic() > limit:
                raise RanksError(f"rank 0 did not join within {seconds:.0f} s: check the output there")
            time.sleep(LOOK)
        if self.rank and (world := int(self._store.get("world"))) != self.world:
            raise RanksError(f"another run, of {world} ranks, uses this port: {FREE_PORT}")
        if self._store.add(f"joined/{self.rank}", 1) > 1:
            raise RanksError(f"another run has a rank {self.rank} at this port: {FREE_PORT}")
        if self.rank == 0:
            self._store.set("world", str(self.world))

    # ------------------------------------------------------------------------------- for the main thread

    def meet(self, seconds: float) -> None:
        """Return once all ranks are here; rank 0 waits for so long. Raises `RanksError`."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._lost or len(self.members) == self.world, None if self.rank else seconds
            )
        if self._lost:
            raise self._lost
        if missing := [rank for rank in range(self.world) if rank not in self.members]:
            sentence = (
                f"{numbered(missing)} did not join within {seconds:.0f} s: check the output there, and that "
                f"{self.members[self.rank].host} can be reached from there"
            )
            self.leave(sentence, 3)
            raise RanksError(sentence)

    def lost(self, seconds: float) -> RanksError | None:
        """Return which rank is lost, if that is known within so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost, seconds)
        return self._lost

    def behind(self) -> str:
        """Name the ranks that others wait for, as they are the least far; "" if all are alike."""
        beats = {rank: beat for rank, beat in self._beats.copy().items() if beat != BYE}
        places = {rank: msgspec.json.decode(beat)[1] for rank, beat in beats.items()}
        places[self.rank] = self.place()
        least = [rank for rank, place in places.items() if place == min(places.values())]
        return self._names(least) if len(least) < len(places) else ""

    def leave(self, reason: str, code: int) -> None:
        """Tell the others why this rank ends, unless all know why the run does.

        Returns once they are told, on rank 0 all of them, as the store may go with it; at most after WORD.
        """
        limit = time.monotonic() + WORD
        if self._lost is None:
            self._word = self._said(reason, code)  # for the other thread to say: the store may not answer
        while self._thread.is_alive() and time.monotonic() < limit:
            if self._lost and (self.rank or list(self._beats.copy().values()) == [BYE] * self.world):
                break
            time.sleep(LOOK)
        self.close(max(BEAT, limit - time.monotonic()))

    def _said(self, reason: str, code: int) -> Verdict:
        return Verdict(f"{self._names([self.rank])} ended: {reason}", code)

    def close(self, seconds: float | None = None) -> None:
        """Stop beating and watching, and wait so long for that: WORD by default, once."""
        if not self._closed.is_set():
            self._closed.set()
            if self._thread.is_alive():
                self._thread.join(WORD if seconds is None else seconds)

    # --------------------------------------------------------------------------------- in its own threads

    def _run(self) -> None:
        pace = LOOK
        try:
            while not self._closed.wait(pace):
                self._beat()
                self._look(pace)
                pace = LOOK if len(self.members) < self.world or self._lost else BEAT
            self._store.set(f"beat/{self.rank}", BYE)
        except RuntimeError:  # the store is gone, which rank 0 holds
            self._closed.wait(BEAT)  # this rank may end as well as rank 0
            self._lose(
                Verdict(f"{self._names([0])} has ended or was killed: check the output there", said=False)
            )
        except Exception as error:  # noqa: BLE001  # nobody would be missed from now on
            failed = f"{self._names([self.rank])}: its heartbeat failed: {describe(error)}"
            self._lose(Verdict(failed, said=False))

    def _watch_store(self) -> None:
        """Miss a store that does not answer: its operations wait without limit."""
        turns, quiet = 0, 0.0
        while quiet <= SILENT:
            if self._closed.wait(BEAT) or not self._thread.is_alive():
                return
            turns, quiet = self._turns, quiet + BEAT if turns == self._turns else 0.0
        self._lose(self._silent([0]))

    def _beat(self) -> None:
        self._turns += 1
        if self._word is not None:
            self._end(self._word)
            self._word = None
        beat = BYE if self._lost else msgspec.json.encode((self._turns, self.place()))
        self._store.set(f"beat/{self.rank}", beat)

    def _look(self, pace: float) -> None:
        """Look who has joined, who beats, and whether the run ends."""
        for rank in range(self.world):
            if rank not in self.members and self._store.check([f"member/{rank}"]):
                self.members[rank] = msgspec.json.decode(self._store.get(f"member/{rank}"), type=Member)
        ranks = sorted(self.members)
        for rank, beat in zip(ranks, self._store.multi_get([f"beat/{rank}" for rank in ranks]), strict=True):
            heard = beat == BYE or beat != self._beats.get(rank)
            self._quiet[rank] = 0.0 if heard else self._quiet[rank] + pace
            self._beats[rank] = beat
        if self._lost is None:
            if self._store.check(["verdict"]):
                self._end()
            elif max(self._quiet.values()) > self.limit:  # others that went with it may be a beat behind
                late = self.limit - 2 * BEAT
                self._end(self._silent([rank for rank, quiet in self._quiet.items() if quiet > late]))
        with self._changed:
            self._changed.notify_all()

    def _end(self, verdict: Verdict | None = None) -> None:
        """End the run, for the first reason that is in the store."""
        mine = "" if verdict is None else msgspec.json.encode(verdict).decode()
        self._lose(msgspec.json.decode(self._store.compare_set("verdict", "", mine), type=Verdict))

    def _lose(self, verdict: Verdict) -> None:
        """End the run on this rank."""
        if self._lost is None and not self._closed.is_set():
            lost = self._lost = RanksError(*verdict)
            timer = threading.Timer(GRACE, lambda: self._closed.is_set() or self.die(lost))
            timer.daemon = True
            timer.start()
        with self._changed:
            self._changed.notify_all()

    def _silent(self, ranks: Iterable[int]) -> Verdict:
        causes = "killed, perhaps for lack of memory, crashed or stopped, or the node is gone"
        return Verdict(f"{self._names(ranks)}: no heartbeat for {self.limit:.0f} s; {causes}", said=False)

    def _names(self, ranks: Iterable[int]) -> str:
        members = self.members.copy()
        where = {rank: f" (process {member.pid} on {member.host})" for rank, member in members.items()}
        return listed([f"rank {rank}{where.get(rank, '')}" for rank in sorted(ranks)])
