"""`Pulse`: which ranks are alive, and why one is not: over the store in which they met, not a collective.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from mla.bench.ranks.errors import RankLost, gone, listed, silent
from mla.bench.ranks.store_watch import StoreWatch
from mla.command import console, last_words
from mla.parallel.groups import CollectiveError

# Seconds between beats; without one for SILENT a rank is gone. A process that is not there on this host is
# gone at once; MORE is for others that go with it. Then this rank has GRACE to notice by itself, and to write
# what it has.
BEAT, SILENT, MORE, GRACE = 0.5, 20.0, 0.2, 10.0
HANGS = "it is assumed to hang; raise --hang-after to wait longer"


class Member(msgspec.Struct, frozen=True):
    """Where a rank runs."""

    host: str
    pid: int
    processes: str  # of which kernel and namespace `pid` is; "" where that is not known


class Ended(msgspec.Struct, frozen=True):
    """Why a rank has ended, and its exit code."""

    reason: str
    code: int


class Store(Protocol):
    """What `torch.distributed.Store` has; its operations raise RuntimeError when the holder is gone."""

    def set(self, key: str, value: Any) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


Die = Callable[[RankLost], None]


class Place(NamedTuple):
    """How far a rank is."""

    forward: int = 0  # the last one before which it has come to where all ranks meet
    inside: bool = False  # of that forward: all have met, and this rank has not said a word since
    entered: int = 0  # collectives, since that meeting
    left: int = 0


def late(places: Mapping[int, Place], groups: Sequence[Sequence[int]]) -> list[int]:
    """Return the ranks for which others wait.

    All ranks meet before a forward, and in it only those of a group share collectives: none is compared
    with ranks of other groups by the number of these.
    """
    newest = max(place.forward for place in places.values())
    found: list[int] = []
    for group in groups:
        found += _late_of({rank: places[rank] for rank in group if rank in places}, newest)
    return sorted(found)


def _late_of(group: Mapping[int, Place], newest: int) -> list[int]:
    """Return who works while others wait; where all of a group wait, who waits in an earlier collective."""
    most = max(((place.forward, place.entered) for place in group.values()), default=(0, 0))
    before = [rank for rank, place in group.items() if (place.forward, place.entered) < most]
    at_work = [
        rank
        for rank, place in group.items()
        if place.entered == place.left and (place.inside or place.forward < newest or rank in before)
    ]
    return at_work or before


def this_process() -> Member:
    """Return where this process runs."""
    kernel = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        kernel = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return Member(socket.gethostname(), os.getpid(), kernel)


def ended(store: Store, rank: int) -> Ended | None:
    """Return the word that a rank has left; None if it has not."""
    key = f"ended/{rank}"
    return msgspec.json.decode(store.get(key), type=Ended) if store.check([key]) else None


def leave(store: Store, rank: int, word: Ended) -> None:
    """Tell the others why a rank ends; nothing if that is not possible any more."""
    with contextlib.suppress(Exception):  # the store went with rank 0
        store.set(f"ended/{rank}", msgspec.json.encode(word))


def first_word(
    store: Store, ranks: Iterable[int], name: Callable[[int], str] = "rank {}".format
) -> RankLost | None:
    """Return why the first of these ranks has ended that has said so, and which others have said the same."""
    words = {rank: word for rank in ranks if (word := ended(store, rank))}
    if not words:
        return None
    first, word = next(iter(words.items()))
    same = [rank for rank, other in words.items() if other == word]
    return RankLost(f"{listed(list(map(name, same)))} ended: {word.reason}", word.code, by=first, ranks=same)


class Pulse:
    """Beats for this rank, and watches the others, until it is closed.

    `die` must end the process: GRACE after another rank was lost, if it has not closed by then.
    """

    def __init__(self, rank: int, members: Sequence[Member], store: Store, die: Die) -> None:
        """`store`: a connection of its own."""
        self._rank, self._members, self._store, self.die = rank, members, store, die
        self._seen = {other: (b"", time.monotonic()) for other in range(len(members)) if other != rank}
        self._lost: RankLost | None = None
        self.place: Callable[[], Place] = Place
        self.groups: Sequence[Sequence[int]] = [range(len(members))]  # of ranks that share collectives
        self._news, self._closed = threading.Condition(), threading.Event()
        self._watch = StoreWatch(SILENT, self._unanswered)
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop beating and watching."""
        with self._watch:
            self._closed.set()
        self._thread.join(2 * BEAT)  # it may wait for a store that does not answer

    def lost(self, seconds: float) -> RankLost | None:
        """Return which rank is lost, if that is known within so many seconds."""
        with self._news:
            self._news.wait_for(lambda: self._lost is not None, timeout=seconds)
        return self._lost

    def behind(self) -> str:
        """Name the ranks for which others wait; "" if there are none, or all are alike."""
        places = {self._rank: self.place()}
        with contextlib.suppress(Exception):  # the store is gone
            for other in self._seen:
                _, forward, inside, entered, left = map(int, self._store.get(f"beat/{other}").split())
                places[other] = Place(forward, bool(inside), entered, left)
        found = late(places, self.groups)
        return listed(self._names(found)) if 0 < len(found) < len(places) else ""

    def _run(self) -> None:
        beat = 0
        while not self._closed.wait(BEAT):
            beat += 1
            try:
                self._store.set(f"beat/{self._rank}", "{} {} {:d} {} {}".format(beat, *self.place()))
                found = first_word(self._store, self._seen, self._name) or self._without_word()
            except RuntimeError:  # the store is gone, and with it whoever held it
                found = self._without_store()
            self._watch.answered()
            if found is not None:
                with contextlib.suppress(Exception), self._watch:
                    self._store.set(f"heard/{self._rank}", b"1")
                self._tell(found)
                return

    def _unanswered(self) -> None:
        self._tell(RankLost(silent([self._holder()], SILENT), 3, ranks=[0]))

    def _tell(self, found: RankLost) -> None:
        with self._news:
            self._lost = self._lost or found
            self._news.notify_all()
        if not self._closed.wait(GRACE):
            self.die(found)

    def _without_word(self) -> RankLost | None:
        """Return which ranks are gone or silent; None if all are well."""
        quiet = {other: self._quiet(other) for other in self._seen}
        if not self._gone() and max(quiet.values(), default=0.0) <= SILENT:
            return None
        self._closed.wait(MORE)
        lost = self._gone()
        still = [other for other, since in quiet.items() if since > SILENT - 2 * BEAT and other not in lost]
        if word := first_word(self._store, self._seen, self._name):  # left since
            return word
        reasons = [gone(self._names(lost))] if lost else []
        if still:
            reasons.append(silent(self._names(still), min(quiet[other] for other in still)))
        return RankLost("; ".join(reasons), 3, ranks=[*lost, *still])

    def _without_store(self) -> RankLost:
        """Return what is known of the ranks once the store does not answer."""
        self._closed.wait(MORE)
        if lost := self._gone():
            return RankLost(gone(self._names(lost)), 3, ranks=lost)
        return RankLost(f"{self._holder()} does not answer any more", 3, ranks=[0])

    def _holder(self) -> str:
        return self._name(0) if self._rank else "torchrun, which has the store,"

    def _gone(self) -> list[int]:
        """Return the ranks that were on this host, and whose process is not there."""
        own = self._members[self._rank].processes
        members = {other: self._members[other] for other in self._seen}
        return [
            other
            for other, member in members.items()
            if own and member.processes == own and not _exists(member.pid)
        ]

    def _quiet(self, other: int) -> float:
        """Return the seconds since a rank was heard of."""
        key, now = f"beat/{other}", time.monotonic()
        beat = self._store.get(key) if self._store.check([key]) else b""
        if beat != self._seen[other][0]:
            self._seen[other] = (beat, now)
        return now - self._seen[other][1]

    def _names(self, ranks: Iterable[int]) -> list[str]:
        return [self._name(rank) for rank in ranks]

    def _name(self, rank: int) -> str:
        member = self._members[rank]
        return f"rank {rank} (process {member.pid} on {member.host})"


@contextlib.contextmanager
def blamed_on(pulse: Pulse, own: bool = False) -> Iterator[None]:
    """Name the rank that is lost, if one is, for what a library raises in the block. Raises `RankLost`.

    `own`: this rank computes as well, so only a `CollectiveError` is worth waiting for who is to blame.
    """
    try:
        yield
    except RuntimeError as error:
        lost = pulse.lost(0 if own and not isinstance(error, CollectiveError) else SILENT + 2 * BEAT)
        if lost is not None:
            raise lost from error
        if isinstance(error, CollectiveError) and (late := pulse.behind()):
            raise RankLost(f"{late} did not come to a collective in which others wait: {HANGS}", 3) from error
        raise


def _exists(pid: int) -> bool:
    """Return whether a process of this host runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False
    except OSError:
        return True


def die(lost: RankLost) -> None:
    """End this process, whatever it waits for."""
    with contextlib.suppress(Exception):
        console.complain(str(lost), lost.common)
        sys.stderr.flush()
        last_words.dismiss()
    os._exit(lost.exit_code)
