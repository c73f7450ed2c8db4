"""`Pulse`: which ranks are alive, and why a run ends, by beats in the store of `torch.distributed`.

A launcher ends all ranks when one is gone, but does not say why; a library may wait for ever, so a thread
ends the process then. A rank that computes for minutes beats on.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from threading import Event, Thread
from typing import Any, NamedTuple

import msgspec

from mla.errors import RanksError
from mla.text import listed

# Seconds between beats, and between looks while ranks still join; after SILENT without a beat a rank is lost.
# GRACE: for this rank to notice by itself, and to write what it has. WORD: to be heard by the others.
BEAT, LOOK, SILENT, GRACE, WORD = 0.5, 0.05, 20.0, 8.0, 5.0
DONE = 1 << 62  # the place of a rank that has ended well


class Beat(NamedTuple):
    """Where a rank runs, how often it has beaten, and how far it is: the more, the farther."""

    name: str
    turn: int = 0
    place: int = 0


class Pulse:
    """Beats for this rank in the run's store, and watches the others, from `start` until it is closed.

    The first verdict in the store ends the run on all ranks: a sentence, an exit code, and whether rank 0
    says it for all. `die` must end the process: GRACE after that, if this has not been closed by then.
    """

    def __init__(self, rank: int, world: int, store: Any, die: Callable[[RanksError], None]) -> None:
        """`store`: a client of its own, since an operation of another thread may wait."""
        self.rank, self.world, self.die, self._store = rank, world, die, store
        self.place: Callable[[], int] = int  # how far this rank is
        self.limit = SILENT
        name = f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"
        self.beats = {rank: Beat(name)}  # the last of each that has joined
        self._quiet = [0.0] * world  # seconds since, as far as this process was running
        self._heard = [time.monotonic()] * world  # when a rank last beat
        self.lost: RanksError | None = None  # why the run is over
        self.over, self._closed = Event(), Event()
        self._thread = Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        """Join the others."""
        self._thread.start()
        Thread(target=self._watch, name="pulse of the store", daemon=True).start()

    def behind(self) -> str:
        """Name the ranks that others wait for, as they are the least far; "" if all are alike."""
        places = {rank: beat.place for rank, beat in self.beats.copy().items()} | {self.rank: self.place()}
        least = [rank for rank, place in sorted(places.items()) if place == min(places.values())]
        return self._names(least) if len(least) < len(places) else ""

    def leave(self, reason: str, code: int) -> None:
        """Tell the others why this rank ends, unless all know why the run does.

        Returns once they are told, on rank 0 all of them, as the store may go with it; at most after WORD.
        """
        if not self._closed.is_set():
            said = (f"{self._names([self.rank])} ended: {reason}", code, True)
            teller = Thread(target=self._tell, args=said, daemon=True)
            teller.start()
            teller.join(WORD)  # the store may not answer
            self.close(BEAT)

    def _tell(self, *verdict: Any) -> None:
        with suppress(RuntimeError):  # the store is gone, or a rank that is to hear it
            self._end(*verdict)
            if self.rank == 0:
                self._store.wait([*map("heard/{}".format, range(self.world))], timedelta(seconds=WORD))

    def close(self, seconds: float = WORD) -> None:
        """Stop beating and watching, and wait so long for that."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _run(self) -> None:
        pace = LOOK
        try:
            while not self._closed.wait(pace):
                self._beat(self.place())
                self._look(pace)
                pace = LOOK if len(self.beats) < self.world else BEAT
            self._beat(DONE)
        except RuntimeError:  # the store is gone, which rank 0 holds
            self._closed.wait(WORD)  # rank 0 may have ended well, and this rank still be at its last steps
            self._lose(f"{self._names([0])} has ended or was killed: check the output there")

    def _beat(self, place: int) -> None:
        turn = self.beats[self.rank].turn + 1
        self.beats[self.rank] = self.beats[self.rank]._replace(turn=turn, place=place)
        self._store.set(f"beat/{self.rank}", msgspec.json.encode(self.beats[self.rank]))
        self._heard[self.rank] = time.monotonic()

    def _look(self, pace: float) -> None:
        """Look who has joined, who beats, and whether the run ends."""
        *beats, verdict = self._store.multi_get([*map("beat/{}".format, range(self.world)), "verdict"])
        for rank, text in enumerate(beats):
            if text and rank != self.rank:
                beat = msgspec.json.decode(text, type=Beat)
                silent = beat == self.beats.get(rank) and beat.place != DONE
                self._quiet[rank] = self._quiet[rank] + pace if silent else 0.0
                self._heard[rank] = self._heard[rank] if silent else time.monotonic()
                self.beats[rank] = beat
        late = self.limit - 2 * BEAT  # others that went with the first may be a beat behind
        if verdict:
            self._end(*msgspec.json.decode(verdict))
        elif max(self._quiet) > self.limit:
            self._end(self._silent(rank for rank, quiet in enumerate(self._quiet) if quiet > late))

    def _watch(self) -> None:
        """Miss a store that does not answer, whose operations wait without limit; end what waits for ever."""
        turn, quiet = -1, 0.0
        while self.lost is None and not self._closed.wait(BEAT):
            last, turn = turn, self.beats[self.rank].turn
            quiet = quiet + BEAT if turn == last else 0.0
            if quiet > SILENT:
                self._lose(self._silent([0]))
        if self.lost is not None and not self._closed.wait(GRACE):
            self.die(self.lost)

    def _end(self, *verdict: Any) -> None:
        """End the run, for the first reason that is in the store, and say that this rank knows it."""
        first = self._store.compare_set("verdict", "", msgspec.json.encode(verdict).decode())
        self._store.set(f"heard/{self.rank}", "")
        self._lose(*msgspec.json.decode(first))

    def _lose(self, sentence: str, code: int = 3, common: bool = False) -> None:
        """End the run on this rank."""
        if self.lost is None and not self._closed.is_set():
            self.lost = RanksError(sentence, code, common)
            self.over.set()

    def _silent(self, ranks: Iterable[int]) -> str:
        silent, now = [*ranks], time.monotonic()
        seconds = listed([f"{now - self._heard[rank]:.0f}" for rank in silent])
        causes = "killed, perhaps for lack of memory, crashed or stopped, or the node is gone"
        return f"{self._names(silent)}: no heartbeat for {seconds} s; {causes}"

    def _names(self, ranks: Iterable[int]) -> str:
        return listed([self.beats[rank].name if rank in self.beats else f"rank {rank}" for rank in ranks])
