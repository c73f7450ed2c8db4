"""`Pulse`: which ranks are alive, and why one is not, by beats in the store of `torch.distributed`.

A launcher ends the others as well when one is gone, but says neither which case was lost nor why; a library
may wait for ever, so a thread ends the process then. A rank that computes for minutes beats on.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec

from mla.command import console, last_words
from mla.errors import MLAError
from mla.parallel.groups import CollectiveError

# Seconds between beats, and between looks while ranks still join; after SILENT without a beat a rank is lost,
# or after BROKEN once a connection to some rank has. GRACE: for this rank to notice by itself, and to write
# what it has. WORD: to be heard by the others.
BEAT, LOOK, SILENT, BROKEN, GRACE, WORD = 0.5, 0.05, 20.0, 5.0, 8.0, 5.0
MAX_NAMED = 8  # ranks that a sentence names
BYE = b"bye"  # the last beat of a rank that ends well
HANGS = "it is assumed to hang; raise --hang-after to wait longer"
KILLED = "killed, perhaps for lack of memory, or crashed"


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


class Member(msgspec.Struct, frozen=True):
    """Where a rank runs."""

    host: str
    pid: int

    def runs(self) -> bool:
        """Return whether there is such a process on this host."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True


class Word(msgspec.Struct, frozen=True):
    """Why a rank ends, or all do, and the exit code; `said`: by the rank that ends first."""

    reason: str
    code: int
    said: bool = True


class Pulse:
    """Beats for this rank in the run's store, and watches the others, until it is closed.

    `die` must end the process: GRACE after another rank was lost, if this has not been closed by then.
    """

    def __init__(
        self, rank: int, world: int, store: Any, die: Callable[[RanksError], None], word: Word | None = None
    ) -> None:
        """`store`: a client of its own, since an operation of another thread may wait.

        `word`: of a rank that has come to say that it ends.
        """
        self.rank, self.world, self.die = rank, world, die
        self.members = {rank: Member(socket.gethostname(), os.getpid())}
        self.busy: Callable[[], bool] = lambda: False  # whether this rank computes, and waits for no other
        self.limit = SILENT  # seconds without a beat
        self._store, self._turns, self._suspected = store, 0, False
        self._beats: dict[int, bytes] = {}  # the last of each rank
        self._quiet: dict[int, float] = {}  # seconds since, as far as this process was running
        self._near: set[int] = set()  # ranks whose processes can be seen here
        self._lost: RanksError | None = None
        self._changed, self._closed = threading.Condition(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        if store.add(f"joined/{rank}", 1) > 1:
            taken = f"another run has a rank {rank} at this port: set MASTER_PORT to a free port on all ranks"
            self._lose(Word(taken, 3, False))
            return
        self._beat()
        if word:
            self._say(word)  # before the others can believe that all goes well
        store.set(f"member/{rank}", msgspec.json.encode(self.members[rank]))
        self._thread.start()
        threading.Thread(target=self._watch_store, name="pulse of the store", daemon=True).start()

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
        """Name the ranks that compute while others wait for them; "" if there are none, or all compute."""
        beats = {rank: beat for rank, beat in self._beats.items() if beat != BYE and rank != self.rank}
        ranks = [rank for rank, beat in beats.items() if msgspec.json.decode(beat)[1]]
        ranks += [self.rank] * self.busy()
        return self._names(ranks) if 0 < len(ranks) < self.world else ""

    def leave(self, reason: str, code: int) -> None:
        """Tell the others why this rank ends, unless all know why the run does; return once they are told."""
        if self._lost is None and self._thread.is_alive():
            self._say(Word(reason, code))
            self.lost(WORD)
        # The store may go with rank 0: those that have joined look soon, others may still be loading.
        limit = time.monotonic() + (3 * BEAT if len(self.members) == self.world else WORD)
        while not self.rank and self._thread.is_alive() and time.monotonic() < limit:
            if self._store.add("told", 0) >= self.world:
                break
            time.sleep(LOOK)
        self.close()

    def close(self) -> None:
        """Stop beating and watching."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(WORD)

    def _say(self, word: Word) -> None:
        self._store.set(f"word/{self.rank}", msgspec.json.encode(word))
        self._store.add("words", 1)

    # --------------------------------------------------------------------------------- in its own threads

    def _run(self) -> None:
        pace = LOOK
        try:
            while not self._closed.wait(pace):
                self._beat()
                self._look(pace)
                pace = LOOK if len(self.members) < self.world else BEAT
            self._store.set(f"beat/{self.rank}", BYE)
        except RuntimeError:  # rank 0 holds the store
            self._lose(Word(f"{self._names([0])}: {KILLED}", 3, False))

    def _watch_store(self) -> None:
        """Miss a store that does not answer: its operations wait without limit."""
        turns, quiet = 0, 0.0
        while quiet <= SILENT:
            if self._closed.wait(BEAT) or not self._thread.is_alive():
                return
            turns, quiet = self._turns, quiet + BEAT if turns == self._turns else 0.0
        self._lose(Word(self._silent([0]), 3, False))

    def _beat(self) -> None:
        self._turns += 1
        self._store.set(f"beat/{self.rank}", msgspec.json.encode((self._turns, self.busy())))

    def _look(self, pace: float) -> None:
        """Look who has joined, and who is lost: all agree on the first verdict that is in the store."""
        for rank in range(self.world):
            if rank not in self.members and self._store.check([f"member/{rank}"]):
                member = msgspec.json.decode(self._store.get(f"member/{rank}"), type=Member)
                self.members[rank] = member
                if member.host == self.members[self.rank].host and member.runs():
                    self._near.add(rank)
        if self._lost is None:
            if self._store.check(["verdict"]):
                self._take(self._store.get("verdict"))
            elif word := self._judge(pace):
                if self._suspected:
                    self._take(self._store.compare_set("verdict", "", msgspec.json.encode(word).decode()))
                self._suspected = True  # one more look, since others may go with it
            else:
                self._suspected = False
        with self._changed:
            self._changed.notify_all()

    def _judge(self, pace: float) -> Word | None:
        """Return why the run should end, if so: a word comes before being gone, or silent."""
        keys = [f"beat/{rank}" for rank in sorted(self.members)]
        for rank, beat in zip(sorted(self.members), self._store.multi_get(keys), strict=True):
            heard = beat == BYE or beat != self._beats.get(rank)
            self._quiet[rank] = 0.0 if heard else self._quiet[rank] + pace
            self._beats[rank] = beat
        if self._store.add("words", 0):
            spoken = [rank for rank in range(self.world) if self._store.check([f"word/{rank}"])]
            words = [msgspec.json.decode(self._store.get(f"word/{rank}"), type=Word) for rank in spoken]
            same = [rank for rank, word in zip(spoken, words, strict=True) if word == words[0]]
            return Word(f"{self._names(same)} ended: {words[0].reason}", words[0].code)
        gone = [rank for rank in self._near if self._beats[rank] != BYE and not self.members[rank].runs()]
        silent = [rank for rank, seconds in self._quiet.items() if seconds > self.limit and rank not in gone]
        reasons = [f"{self._names(gone)}: {KILLED}"] if gone else []
        reasons += [self._silent(silent)] if silent else []
        return Word("; ".join(reasons), 3, False) if reasons else None

    def _take(self, verdict: bytes) -> None:
        self._lose(msgspec.json.decode(verdict, type=Word))
        self._store.add("told", 1)

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
        where = {rank: f" (process {member.pid} on {member.host})" for rank, member in self.members.items()}
        return listed([f"rank {rank}{where.get(rank, '')}" for rank in sorted(ranks)])


@contextlib.contextmanager
def blamed_on(pulse: Pulse, computes: bool = False) -> Iterator[None]:
    """Name the rank that is lost, if one is, for what a library raises in the block. Raises `RanksError`.

    `computes`: this rank does as well, so only a `CollectiveError` is worth waiting for who is to blame.
    """
    try:
        yield
    except RuntimeError as error:
        patience = 0.0
        if not computes or isinstance(error, CollectiveError):
            pulse.limit = min(BROKEN, SILENT)
            patience = pulse.limit + 4 * BEAT
        if (lost := pulse.lost(patience)) is not None:
            raise lost from error
        if isinstance(error, CollectiveError) and (behind := pulse.behind()):
            raise RanksError(
                f"{behind} did not join a collective that other ranks wait in: {HANGS}"
            ) from error
        raise


def die(lost: RanksError) -> None:
    """End this process, whatever it waits for."""
    with contextlib.suppress(Exception):
        console.complain(str(lost), lost.common)
        sys.stderr.flush()
        last_words.dismiss(lost.exit_code)
    os._exit(lost.exit_code)
