"""`Pulse`: which ranks are alive, and why one is not: over connections of its own, not a collective.

Every rank has one to rank 0, which tells the others what it hears. The system closes it when a process is
gone; beats miss one that is stopped, or whose node is lost. A launcher ends the others as well, but says
neither which case was lost nor why; a library may wait for ever, so this thread ends the process then.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from mla.bench.ranks.errors import RanksError, listed, numbered
from mla.command import console, last_words
from mla.parallel.groups import CollectiveError

# Seconds between beats; without one for SILENT, a rank is gone. MORE is for others that go with it. Then this
# rank has GRACE to notice by itself, and to write what it has. WORD: that one which ends waits to be heard.
BEAT, SILENT, MORE, GRACE, WORD = 0.5, 20.0, 0.2, 10.0, 5.0
LINE = 1 << 20  # bytes of a message, at most
HANGS = "it is assumed to hang; raise --hang-after to wait longer"


class Member(msgspec.Struct, frozen=True):
    """Where a rank runs."""

    host: str
    pid: int


class Word(msgspec.Struct, frozen=True):
    """Why a rank ends, or from rank 0 why all do, and the exit code; `said`: by the rank that ends first."""

    reason: str
    code: int
    said: bool = True


class Place(NamedTuple):
    """How far a rank is."""

    forward: int = 0  # the last one before which it has come to where all ranks meet
    inside: bool = False  # of that forward: all have met, and this rank has not said a word since
    entered: int = 0  # collectives, since that meeting
    left: int = 0


class News(msgspec.Struct, omit_defaults=True):
    """What one end of a connection tells the other, in a line of JSON; a rank's first one has its member."""

    places: dict[int, Place] = {}
    members: dict[int, Member] = {}
    word: Word | None = None
    bye: bool = False  # this end closes the connection, and all is well


def late(places: Mapping[int, Place], groups: Sequence[Sequence[int]]) -> list[int]:
    """Return the ranks for which others wait: of each group those at work, or else those that are less far.

    All ranks meet before a forward, and in it only those of a group share collectives: none is compared
    with ranks of other groups by the number of these.
    """
    newest, found = max(place.forward for place in places.values()), []
    for group in groups:
        come = {rank: places[rank] for rank in group if rank in places}
        far = max((place.forward, place.entered) for place in come.values()) if come else (0, 0)
        working = [rank for rank, place in come.items() if place.inside and place.entered == place.left]
        found += working or [
            rank
            for rank, place in come.items()
            if (place.forward, place.entered) < far or place.forward < newest
        ]
    return found


class Pulse:
    """Beats for this rank, and watches the others, until it is closed.

    `die` must end the process: GRACE after another rank was lost, if this has not been closed by then.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        peer: socket.socket,
        die: Callable[[RanksError], None],
        word: Word | None = None,
    ) -> None:
        """`peer`: where other ranks connect to on rank 0; elsewhere, the connection to it.

        `word`: of a rank that has come to say that it ends.
        """
        self.rank, self.world, self.die = rank, world, die
        self.members = {rank: Member(socket.gethostname(), os.getpid())}
        self.place: Callable[[], Place] = Place
        self.groups: Sequence[Sequence[int]] = [range(world)]  # of ranks that share collectives
        self._places: dict[int, Place] = {}
        self._lost: RanksError | None = None
        self._why: Word | None = None  # the same, for those that come later
        self._news = threading.Condition()
        # Of the other ends: how to write to each, beats since it was heard, and what has become of it.
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._quiet: dict[int, int] = {}
        self._words: dict[int, Word] = {rank: word} if word else {}
        self._gone: list[int] = []
        self._judging = False
        self._loop, self._closed = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=(peer,), name="pulse", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------- for the main thread

    def meet(self, seconds: float) -> None:
        """Return once all ranks are here; rank 0 waits for so long. Raises `RanksError`."""
        with self._news:
            self._news.wait_for(self._all_here_or_lost, None if self.rank else seconds)
        if self._lost:
            raise self._lost
        if missing := [rank for rank in range(self.world) if rank not in self.members]:
            hosts = listed(list(dict.fromkeys(member.host for member in self.members.values())))
            sentence = (
                f"{numbered(missing)} did not join within {seconds:.0f} s; the ranks on {hosts} did. Check "
                "the log of each, and that its node can reach this port"
            )
            self.leave(sentence, 3)
            raise RanksError(sentence)

    def _all_here_or_lost(self) -> bool:
        return self._lost is not None or (len(self.members) == self.world and not self._judging)

    def lost(self, seconds: float) -> RanksError | None:
        """Return which rank is lost, if that is known within so many seconds."""
        with self._news:
            self._news.wait_for(lambda: self._lost is not None, seconds)
        return self._lost

    def behind(self) -> str:
        """Name the ranks for which others wait; "" if there are none, or all are alike."""
        places = {**self._places, self.rank: self.place()}
        ranks = late(places, self.groups)
        return self._names(ranks) if 0 < len(ranks) < len(places) else ""

    def leave(self, reason: str, code: int) -> None:
        """Tell the others why this rank ends, unless all know why the run does; return once they are told."""
        if not self._thread.is_alive():  # closed: the run is over
            return
        if self._lost is None:
            self._call(lambda: self._heard(self.rank, News(word=Word(reason, code))))
        told = lambda: self._lost is not None and (self.rank or len(self.members) == self.world)  # noqa: E731
        with self._news:
            self._news.wait_for(told, WORD)
        self.close()

    def close(self) -> None:
        """Stop beating and watching."""
        self._call(self._closed.set)
        self._thread.join(WORD)

    def _call(self, work: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # it has been closed
            self._loop.call_soon_threadsafe(work)

    # ---------------------------------------------------------------------------------- in the own thread

    def _run(self, peer: socket.socket) -> None:
        self._loop.run_until_complete(self._live(peer))
        self._loop.close()

    async def _live(self, peer: socket.socket) -> None:
        server = None
        if self.rank:
            reader, writer = await asyncio.open_connection(sock=peer, limit=LINE)
            self._writers[0], self._quiet[0] = writer, 0
            self._send(News(members=self.members, word=self._words.get(self.rank)))
            self._talking = asyncio.ensure_future(self._talk(reader, writer))  # the loop alone keeps no task
        else:
            server = await asyncio.start_server(self._talk, sock=peer, limit=LINE)
            if self._words:
                self._judge_soon()
        while not self._closed.is_set():
            self._send(News(places={**(self._places if not self.rank else {}), self.rank: self.place()}))
            for other in self._quiet:
                self._quiet[other] += 1  # not seconds: those in which this process is stopped do not count
            if self._silent() and not self._judging:
                self._judge()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._closed.wait(), BEAT)
        self._send(News(bye=self._lost is None))
        for writer in list(self._writers.values()):
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                writer.close()
                await asyncio.wait_for(writer.wait_closed(), BEAT)
        if server is not None:
            server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # in which transports close

    def _send(self, news: News) -> None:
        line = _line(news)
        for writer in self._writers.values():
            writer.write(line)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hear the other end of a connection until it is gone."""
        other = 0 if self.rank else None
        with contextlib.suppress(OSError, ValueError, msgspec.MsgspecError):
            async for line in reader:
                news = msgspec.json.decode(line, type=News)
                if other is None and (other := self._welcome(news, writer)) is None:
                    break
                self._heard(other, news)
        writer.close()
        if other in self._quiet:  # it said no good-bye
            del self._quiet[other], self._writers[other]
            self._gone.append(other)
            self._judge_soon()

    def _welcome(self, news: News, writer: asyncio.StreamWriter) -> int | None:
        """Return which rank has come; None if that is one of another run, which is left alone."""
        for rank in news.members:
            if 0 < rank < self.world and rank not in self.members:
                self._writers[rank] = writer
                writer.write(_line(News(members=self.members, word=self._why)))
                return rank
            said = f"another run has a rank {rank} at this port: set MASTER_PORT to a free one, for all ranks"
            writer.write(_line(News(word=Word(said, 3, False))))
        return None

    def _heard(self, other: int, news: News) -> None:
        """Take what another rank says, or this one of itself."""
        if other != self.rank:
            self._quiet[other] = 0
        self._places |= news.places
        if news.word and self.rank and not other:
            self._lose(news.word)
        elif news.word and self.rank:
            self._send(news)
        elif news.word:
            self._words[other] = news.word
            self._judge_soon()
        if news.members:
            with self._news:
                self.members |= news.members
                self._news.notify_all()
            if not self.rank and len(self.members) == self.world:
                self._send(News(members=self.members))
        if news.bye:
            self._quiet.pop(other, None)
            self._writers.pop(other, None)

    def _judge_soon(self) -> None:
        if not self._judging:
            self._judging = True
            self._loop.call_later(MORE, self._judge)

    def _silent(self, soon: int = 0) -> list[int]:
        """Return who has not been heard of for too long, or will not have been in so many beats."""
        return [other for other, beats in self._quiet.items() if (beats + soon) * BEAT > SILENT]

    def _judge(self) -> None:
        """Say what has become of the ranks that were lost: a word comes before being gone, or silent."""
        self._judging = True
        if self._words:
            word = next(iter(self._words.values()))
            same = [rank for rank, other in self._words.items() if other == word]
            self._lose(Word(f"{self._names(same)} ended: {word.reason}", word.code))
            return
        reasons = []
        if self._gone:
            reasons.append(f"{self._names(self._gone)}: killed, perhaps for lack of memory, or crashed")
        if silent := self._silent(soon=4):
            reasons.append(
                f"{self._names(silent)}: no heartbeat for {SILENT:.0f} s; stopped, or the node is gone"
            )
        self._lose(Word("; ".join(reasons), 3, False))

    def _lose(self, word: Word) -> None:
        """End the run, for that reason."""
        if self._lost is not None:
            return
        lost = RanksError(word.reason, word.code, word.said)
        with self._news:
            self._lost, self._why = lost, word
            self._news.notify_all()
        if not self.rank:
            self._send(News(word=word))
        self._loop.call_later(GRACE, lambda: self.die(lost))

    def _names(self, ranks: Iterable[int]) -> str:
        return listed([self._name(rank) for rank in sorted(ranks)])

    def _name(self, rank: int) -> str:
        member = self.members.get(rank)
        return f"rank {rank} (process {member.pid} on {member.host})" if member else f"rank {rank}"


def _line(news: News) -> bytes:
    return msgspec.json.encode(news) + b"\n"


@contextlib.contextmanager
def blamed_on(pulse: Pulse, own: bool = False) -> Iterator[None]:
    """Name the rank that is lost, if one is, for what a library raises in the block. Raises `RanksError`.

    `own`: this rank computes as well, so only a `CollectiveError` is worth waiting for who is to blame.
    """
    try:
        yield
    except RuntimeError as error:
        lost = pulse.lost(0 if own and not isinstance(error, CollectiveError) else SILENT + 2 * BEAT)
        if lost is not None:
            raise lost from error
        if isinstance(error, CollectiveError) and (late := pulse.behind()):
            raise RanksError(f"{late} did not join a collective that other ranks wait in: {HANGS}") from error
        raise


def die(lost: RanksError) -> None:
    """End this process, whatever it waits for."""
    with contextlib.suppress(Exception):
        console.complain(str(lost), lost.common)
        sys.stderr.flush()
        last_words.dismiss(lost.exit_code)
    os._exit(lost.exit_code)
