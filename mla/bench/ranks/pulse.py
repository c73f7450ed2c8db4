"""`Pulse`: which ranks are alive, and why one is not, by beats in the store of `torch.distributed`.

A launcher ends the others as well when one is gone, but says neither which case was lost nor why; a library
may wait for ever, so a thread ends the process then. A rank that computes for minutes beats on.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mla.errors import MLAError
from mla_backends.errors import describe

# Seconds between beats, and between looks while ranks still join; after SILENT without a beat a rank is lost.
# GRACE: for this rank to notice by itself, and to write what it has. WORD: to be heard by the others.
BEAT, LOOK, SILENT, GRACE, WORD = 0.5, 0.05, 20.0, 8.0, 5.0
STRANGER = 10.0  # seconds for a rank to come after one of its number was refused for its options
MAX_NAMED = 8  # ranks that a sentence names
BYE = b"bye"  # the last beat of a rank that ends well
KILLED = "killed, perhaps for lack of memory, or crashed"
FREE_PORT = "set MASTER_PORT to a free port on all ranks"
SAME_OPTIONS = "start all ranks with the same options, and give every run a MASTER_PORT of its own"


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


class Run(msgspec.Struct, frozen=True):
    """What all ranks of a run have alike: their number, and what the launcher calls the run, if it does.

    `options` are those of ranks that no launcher names, by flag; empty where a rank does not know them.
    """

    world: int
    launch: str = ""
    options: dict[str, str] = {}


def differing(expected: Mapping[str, str], given: Mapping[str, str], shown: bool = True) -> str:
    """Return what is not as expected, as in "--seed (1, not 0)"; values only where they are shown."""
    names = [name for name in {**expected, **given} if given.get(name) != expected.get(name)]
    return listed([f"{n} ({given.get(n)}, not {expected.get(n)})" if shown else n for n in names])


class Member(msgspec.Struct, frozen=True):
    """Where a rank runs."""

    host: str
    pid: int

    def runs(self) -> bool:
        """Return whether such a process runs on this host; a zombie does not."""
        with contextlib.suppress(OSError):  # another system has no such file
            state = Path(f"/proc/{self.pid}/stat").read_text(errors="replace").rpartition(") ")[2][:1]
            return state not in ("Z", "X")
        try:
            os.kill(self.pid, 0)
        except OSError as error:
            return isinstance(error, PermissionError)
        return True


class Word(msgspec.Struct, frozen=True):
    """Why a rank ends, or all do, and the exit code; `said`: by the rank that ends first."""

    reason: str
    code: int
    said: bool = True


class Place(msgspec.Struct, frozen=True, array_like=True):
    """How far a rank is."""

    busy: bool = False  # it computes, and waits for no other
    forwards: int = 0  # before which it has come to where all ranks meet
    entered: int = 0  # collectives since then


class Beat(msgspec.Struct, frozen=True, array_like=True):
    """A sign of life."""

    turn: int
    told: bool = False  # knows why the run ends
    place: Place = Place()


class Pulse:
    """Beats for this rank in the run's store, and watches the others, until it is closed.

    `die` must end the process: GRACE after another rank was lost, if this has not been closed by then.
    """

    def __init__(
        self,
        rank: int,
        run: Run,
        store: Any,
        die: Callable[[RanksError], None],
        word: Word | None = None,
        seconds: float = 0.0,
    ) -> None:
        """`store`: a client of its own, since an operation of another thread may wait.

        `word`: of a rank that has come to say that it ends. `seconds`: the wait for rank 0. Raises
        `RanksError` without it, and where the store is another run's.
        """
        self.rank, self.world, self.die = rank, run.world, die
        self.members = {rank: Member(socket.gethostname(), os.getpid())}
        self.place: Callable[[], Place] = Place
        self.groups: Sequence[Sequence[int]] = [range(run.world)]  # of ranks that share collectives
        self.limit = SILENT  # seconds without a beat
        self._store, self._turns, self._suspected = store, 0, False
        self._word = word  # yet to be said
        self._lost: RanksError | None = None
        self._beats: dict[int, Beat | None] = {}  # the last of each rank; None: it has ended well
        self._quiet: dict[int, float] = {}  # seconds since, as far as this process was running
        self._near: set[int] = set()  # ranks whose processes can be seen here
        self._strangers: dict[int, float] = {}  # by number, when one with other options was first seen
        self._changed, self._closed = threading.Condition(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._enter(run, seconds)
        self._beat()  # with the word, before the others can believe that all goes well
        store.set(f"member/{rank}", msgspec.json.encode(self.members[rank]))
        self._thread.start()
        threading.Thread(target=self._watch_store, name="pulse of the store", daemon=True).start()

    def _enter(self, run: Run, seconds: float) -> None:
        """Take this rank's place, unless the store is another run's, which must not notice."""
        limit = time.monotonic() + seconds
        while self.rank and not self._store.check(["run"]):  # under torchrun the store is there before rank 0
            if time.monotonic() > limit:
                raise RanksError(f"rank 0 did not join within {seconds:.0f} s: check the output there")
            time.sleep(LOOK)
        first = msgspec.json.decode(self._store.get("run"), type=Run) if self.rank else run
        if (first.world, first.launch) != (run.world, run.launch):
            raise RanksError(f"another run, of {first.world} ranks, uses this port: {FREE_PORT}")
        if first.options and run.options and first.options != run.options:
            reason = (
                f"rank {self.rank} differs from rank 0 in options: {differing(first.options, run.options)}"
            )
            self._store.set(f"stranger/{self.rank}", f"{reason}; {SAME_OPTIONS}")
            raise RanksError(f"{reason}; {SAME_OPTIONS}")
        if self._store.add(f"joined/{self.rank}", 1) > 1:
            raise RanksError(f"another run has a rank {self.rank} at this port: {FREE_PORT}")
        if self.rank == 0:
            self._store.set("run", msgspec.json.encode(run))

    # ------------------------------------------------------------------------------- for the main thread

    def meet(self, seconds: float) -> None:
        """Return once all ranks are here; rank 0 waits for so long. Raises `RanksError`."""
        with self._changed:
            self._changed.wait_for(self._all_here_or_lost, None if self.rank else seconds)
        if self._lost:
            raise self._lost
        if missing := [rank for rank in range(self.world) if rank not in self.members]:
            sentence = (
                f"{numbered(missing)} did not join within {seconds:.0f} s: check the output there, and that "
                f"{self.members[self.rank].host} can be reached from there"
            )
            self.leave(sentence, 3)
            raise RanksError(sentence)

    def _all_here_or_lost(self) -> bool:
        return self._lost is not None or (len(self.members) == self.world and not self._suspected)

    def lost(self, seconds: float) -> RanksError | None:
        """Return which rank is lost, if that is known within so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None, seconds)
        return self._lost

    def behind(self) -> str:
        """Name the ranks that others wait for; "" if there are none, or all are alike.

        Of each group of ranks that share collectives, these are the ones that compute, or else the least far.
        """
        places = {rank: beat.place for rank, beat in self._beats.copy().items() if beat is not None}
        places[self.rank] = self.place()
        newest, behind = max(place.forwards for place in places.values()), list[int]()
        for group in self.groups:
            far = {rank: (places[rank].forwards, places[rank].entered) for rank in group if rank in places}
            busy = [rank for rank in far if places[rank].busy]
            behind += busy or [
                rank for rank, place in far.items() if place < max(far.values()) or place[0] < newest
            ]
        return self._names(behind) if 0 < len(behind) < self.world else ""

    def leave(self, reason: str, code: int) -> None:
        """Tell the others why this rank ends, unless all know why the run does.

        Returns once they are told, on rank 0 all of them, as the store may go with it; at most after WORD.
        """
        limit = time.monotonic() + WORD
        if self._lost is None:
            self._word = Word(reason, code)  # for the other thread to say: the store may not answer
        while self._thread.is_alive() and time.monotonic() < limit:
            if self._lost is not None and (self.rank or self._all_told()):
                break
            time.sleep(LOOK)
        self.close(max(BEAT, limit - time.monotonic()))

    def _all_told(self) -> bool:
        """Return whether every rank knows why the run ends, or is gone, or silent."""
        beats, gone = self._beats.copy(), self._gone()
        return len(beats) == self.world and all(
            beat is None or beat.told or rank in gone or self._quiet[rank] > self.limit
            for rank, beat in beats.items()
        )

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
            self._closed.wait(BEAT)  # its process is gone a little later
            ended = f": {KILLED}" if 0 in self._gone() else " has ended or was killed: check the output there"
            self._lose(Word(f"{self._names([0])}{ended}", 3, False))
        except Exception as error:  # noqa: BLE001  # nobody would be missed from now on
            self._lose(Word(f"{self._names([self.rank])}: its heartbeat failed: {describe(error)}", 3, False))

    def _watch_store(self) -> None:
        """Miss a store that does not answer: its operations wait without limit."""
        turns, quiet = 0, 0.0
        while quiet <= SILENT:
            if self._closed.wait(BEAT) or not self._thread.is_alive():
                return
            turns, quiet = self._turns, quiet + BEAT if turns == self._turns else 0.0
        self._lose(Word(self._silent([0]), 3, False))

    def _beat(self) -> None:
        if self._word is not None:
            self._store.set(f"word/{self.rank}", msgspec.json.encode(self._word))
            self._store.add("words", 1)
            self._word = None
        self._turns += 1
        beat = Beat(self._turns, self._lost is not None, self.place())
        self._store.set(f"beat/{self.rank}", msgspec.json.encode(beat))

    def _look(self, pace: float) -> None:
        """Look who has joined, and who is lost: all agree on the first verdict that is in the store."""
        for rank in range(self.world):
            if rank not in self.members and self._store.check([f"member/{rank}"]):
                data = self._store.get(f"member/{rank}")
                self.members[rank] = member = msgspec.json.decode(data, type=Member)
                if member.host == self.members[self.rank].host and member.runs():
                    self._near.add(rank)
            elif rank not in self.members and self._store.check([f"stranger/{rank}"]):
                self._strangers.setdefault(rank, time.monotonic())
        self._hear(pace)
        if self._lost is None:
            if self._store.check(["verdict"]):
                self._take(self._store.get("verdict"))
            elif word := self._judge():
                if self._suspected:
                    self._take(self._store.compare_set("verdict", "", msgspec.json.encode(word).decode()))
                self._suspected = True  # one more look, since others may go with it
            else:
                self._suspected = False
        with self._changed:
            self._changed.notify_all()

    def _hear(self, pace: float) -> None:
        ranks = sorted(self.members)
        for rank, data in zip(ranks, self._store.multi_get([f"beat/{rank}" for rank in ranks]), strict=True):
            beat = None if data == BYE else msgspec.json.decode(data, type=Beat)
            heard = beat is None or beat != self._beats.get(rank)
            self._quiet[rank] = 0.0 if heard else self._quiet[rank] + pace
            self._beats[rank] = beat

    def _judge(self) -> Word | None:
        """Return why the run should end, if so: a word comes before being gone, or silent."""
        if self._store.add("words", 0):
            spoken = [rank for rank in range(self.world) if self._store.check([f"word/{rank}"])]
            words = [msgspec.json.decode(self._store.get(f"word/{rank}"), type=Word) for rank in spoken]
            if words:  # of this run's ranks
                same = [rank for rank, word in zip(spoken, words, strict=True) if word == words[0]]
                return Word(f"{self._names(same)} ended: {words[0].reason}", words[0].code)
        for rank, since in self._strangers.items():
            if rank not in self.members and time.monotonic() - since > STRANGER:
                return Word(self._store.get(f"stranger/{rank}").decode(), 3)
        gone = self._gone()
        silent = [rank for rank, seconds in self._quiet.items() if seconds > self.limit and rank not in gone]
        reasons = [f"{self._names(gone)}: {KILLED}"] if gone else []
        reasons += [self._silent(silent)] if silent else []
        return Word("; ".join(reasons), 3, False) if reasons else None

    def _gone(self) -> list[int]:
        """Return the ranks whose processes have ended without a word; those on other hosts are not seen."""
        unfinished = [rank for rank in self._near.copy() if self._beats.get(rank) is not None]
        return [rank for rank in unfinished if not self.members[rank].runs()]

    def _take(self, verdict: bytes) -> None:
        self._lose(msgspec.json.decode(verdict, type=Word))
        self._beat()  # rank 0 waits for that

    def _lose(self, word: Word) -> None:
        """End the run, for that reason."""
        if self._lost is None and not self._closed.is_set():
            lost = self._lost = RanksError(word.reason, word.code, word.said)
            timer = threading.Timer(GRACE, lambda: self._closed.is_set() or self.die(lost))
            timer.daemon = True
            timer.start()
        with self._changed:
            self._changed.notify_all()

    def _silent(self, ranks: Iterable[int]) -> str:
        return f"{self._names(ranks)}: no heartbeat for {self.limit:.0f} s; stopped, or the node is gone"

    def _names(self, ranks: Iterable[int]) -> str:
        members = self.members.copy()
        where = {rank: f" (process {member.pid} on {member.host})" for rank, member in members.items()}
        return listed([f"rank {rank}{where.get(rank, '')}" for rank in sorted(ranks)])
