"""Who is missed, and what is said of several: over real connections, of ranks of which some do not run."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest

from mla.bench.ranks import pulse
from mla.bench.ranks.errors import RanksError
from mla.bench.ranks.pulse import Member, News, Place, Pulse, Word
from mla.parallel.layout import Layout

PATIENCE = 60.0  # seconds
AWAY = "rank {} (process 7 on elsewhere)"


class Ranks:
    """Rank 0 of several, and the connections of others to it."""

    def __init__(self, world: int) -> None:
        self.world, self._server = world, socket.create_server(("127.0.0.1", 0))
        self.address = self._server.getsockname()
        self.zero = Pulse(0, world, self._server, lambda lost: None)
        self.others: list[Pulse] = []
        self.peers: list[socket.socket] = []

    def connect(self, rank: int, word: Word | None = None) -> socket.socket:
        """Have a rank come that then does nothing: process 7 of another host."""
        self.peers.append(peer := socket.create_connection(self.address))
        member = Member("elsewhere", 7)
        peer.sendall(msgspec.json.encode(News(members={rank: member}, word=word)) + b"\n")
        return peer

    def real(self, rank: int) -> Pulse:
        """Have a rank come that beats."""
        self.others.append(Pulse(rank, self.world, socket.create_connection(self.address), lambda lost: None))
        return self.others[-1]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Ranks]]:
    """Return a function from a number of ranks to them."""
    monkeypatch.setattr(pulse, "BEAT", 0.02)
    monkeypatch.setattr(pulse, "SILENT", 0.5)
    made: list[Ranks] = []

    def ranks(world: int) -> Ranks:
        made.append(Ranks(world))
        return made[-1]

    yield ranks
    for each in made:
        for end in (*each.others, each.zero, *each.peers):
            end.close()


def test_several_that_are_silent_are_named_together(ranks: Callable[[int], Ranks]) -> None:
    run = ranks(3)
    run.connect(1)
    run.connect(2)
    found = run.zero.lost(PATIENCE)
    assert (
        str(found)
        == f"{AWAY.format(1)} and {AWAY.format(2)}: no heartbeat for 0 s; stopped, or the node is gone."
    )
    assert found is not None
    assert (found.exit_code, found.common) == (3, False)


def test_one_that_is_gone_is_named_by_all_and_no_other(ranks: Callable[[int], Ranks]) -> None:
    run = ranks(3)
    other, peer = run.real(1), run.connect(2)
    run.zero.meet(PATIENCE)
    other.meet(PATIENCE)
    peer.close()
    for each in (run.zero, other):
        found = each.lost(PATIENCE)
        assert (
            str(found) == "rank 2 (process 7 on elsewhere): killed, perhaps for lack of memory, or crashed."
        )


def test_all_that_say_the_same_are_named_and_a_word_comes_before_silence(
    ranks: Callable[[int], Ranks],
) -> None:
    run = ranks(4)
    word = Word("out of memory", 5)
    for rank in (1, 2):
        run.connect(rank, word)
    run.connect(3).close()
    with pytest.raises(RanksError) as caught:
        run.zero.meet(PATIENCE)
    assert str(caught.value) == f"{AWAY.format(1)} and {AWAY.format(2)} ended: out of memory."
    assert (caught.value.exit_code, caught.value.common) == (5, True)


def test_ranks_that_never_come_are_named_on_all(
    ranks: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "WORD", 1.0)
    run = ranks(4)
    other = run.real(2)
    with pytest.raises(RanksError, match=r"^ranks 1 and 3 did not join within 0 s; the ranks on \S+ did\. "):
        run.zero.meet(0.3)
    with pytest.raises(RanksError, match=r"^rank 0 .* ended: ranks 1 and 3 did not join within 0 s; "):
        other.meet(PATIENCE)


def test_rank_0_waits_for_those_that_have_not_heard_why_it_ends(
    ranks: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "WORD", PATIENCE)
    run = ranks(3)
    leaving = threading.Thread(target=run.zero.leave, args=("the card is gone", 3), daemon=True)
    leaving.start()
    for rank in (1, 2):
        assert leaving.is_alive()
        with pytest.raises(RanksError, match=r"^rank 0 \(process \d+ on \S+\) ended: the card is gone\.$"):
            run.real(rank).meet(PATIENCE)
    leaving.join(PATIENCE)
    assert not leaving.is_alive()


def test_a_rank_of_another_run_is_refused_and_the_first_goes_on(ranks: Callable[[int], Ranks]) -> None:
    run = ranks(2)
    run.real(1).meet(PATIENCE)
    with pytest.raises(RanksError, match=r"^another run has a rank 1 at this port: set MASTER_PORT"):
        run.real(1).meet(PATIENCE)
    socket.create_connection(run.address).close()  # nor does a stranger count
    assert run.zero.lost(0.2) is None


def test_a_rank_that_ends_well_is_not_missed(ranks: Callable[[int], Ranks]) -> None:
    run = ranks(2)
    run.real(1).meet(PATIENCE)
    run.others[0].close()
    assert run.zero.lost(1.0) is None


MEETS, WORKS = Place(4), Place(4, True, 1, 1)  # waits for the others before forward 4; is in it
WAITS, DONE = Place(4, True, 2, 1), Place(4, False, 2, 2)  # in its second collective; through with it
NEXT, LIBRARY = Place(5), Place(4, False, 1, 0)  # waits before forward 5; in a collective of no forward


@pytest.mark.parametrize(
    ("layout", "places", "late"),
    [
        ("tp=2", [WAITS, WORKS], [1]),
        ("tp=2", [WORKS, WAITS], [0]),
        ("tp=2", [DONE, WORKS], [1]),  # it hangs after the last collective
        ("tp=2", [LIBRARY, MEETS], [1]),
        ("tp=2", [WAITS, WAITS], []),  # so the library hangs
        ("tp=2", [WORKS, WORKS], []),
        ("tp=2", [WAITS, Place(4, True, 1, 0)], [1]),  # in another collective
        ("tp=2", [MEETS, Place(3, False, 2, 2)], [1]),  # on its way to the meeting
        ("dp=2", [DONE, Place(4, True)], [1]),  # without collectives
        ("dp=2", [Place(4, True), DONE], [0]),
        ("dp=2", [NEXT, Place(4, True)], [1]),
        ("dp=2,tp=2", [Place(4, False, 9, 9), Place(4, False, 9, 9), WAITS, WORKS], [3]),
        ("dp=2,tp=2", [NEXT, NEXT, WAITS, WORKS], [3]),
        ("dp=2,tp=2", [Place(4, False, 1, 1), Place(4, False, 1, 1), WAITS, WORKS], [3]),
        ("dp=2,tp=2", [WORKS, WAITS, DONE, DONE], [0]),
        ("dp=2,tp=2", [WORKS, WAITS, WAITS, Place(4, True, 1, 0)], [0, 3]),  # in groups of their own
        ("dp=2,tp=2", [Place(4, True, 9, 8), Place(4, True, 8, 8), WAITS, WORKS], [1, 3]),
        ("tp=2,dcp=2", [Place(4, True, 3, 2), Place(4, True, 3, 2), WAITS, WORKS], [3]),  # 2 waits for 3
    ],
)
def test_only_those_are_late_for_whom_others_wait(layout: str, places: list[Place], late: list[int]) -> None:
    """Ranks of another part of `dp` have collectives, requests and thus numbers of their own."""
    found = pulse.late(dict(enumerate(places)), Layout.parse(layout).head_groups())
    assert (found if len(found) < len(places) else []) == late
