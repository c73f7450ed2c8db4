"""Who is missed, and what is said of several: ranks of one process, which share a store."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from queue import Queue
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from mla.bench.ranks import launch, pulse
from mla.bench.ranks.crew import Crew
from mla.bench.ranks.pulse import Beat, Pulse
from mla.errors import RanksError

TIMEOUT_S = 60.0
AWAY = "rank {} (process 7 on elsewhere)"


class Ranks:
    """Rank 0 of several, and others that join it."""

    def __init__(self, world: int) -> None:
        tcp, timeout = vars(torch.distributed)["TCPStore"], timedelta(seconds=TIMEOUT_S)
        self.server = tcp("127.0.0.1", 0, None, True, timeout, wait_for_workers=False)
        self.connect = lambda: tcp("127.0.0.1", self.server.port, None, False, timeout)
        self.world, self.store = world, self.connect()
        self.pulses: list[Pulse] = []
        self.zero = self.real(0)

    def real(self, rank: int, store: Any = None, starts: bool = True) -> Pulse:
        """Have a rank join that beats."""
        store = store or self.connect()
        launch.enter(store, rank, self.world, TIMEOUT_S)
        self.pulses.append(Pulse(rank, self.world, store, lambda lost: None))
        if starts:
            self.pulses[-1].start()
        return self.pulses[-1]

    def join(self, rank: int) -> None:
        """Have a rank join that then does nothing."""
        self.store.set(f"beat/{rank}", msgspec.json.encode(Beat(AWAY.format(rank))))


def lost(pulse: Pulse, seconds: float = TIMEOUT_S) -> RanksError | None:
    """Return why a run is over, once it is."""
    pulse.over.wait(seconds)
    return pulse.lost


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Ranks]]:
    """Return a function from a number of ranks to them."""
    monkeypatch.setattr(pulse, "BEAT", 0.02)
    monkeypatch.setattr(pulse, "SILENT", 0.5)
    made: list[Ranks] = []

    def start(world: int) -> Ranks:
        made.append(Ranks(world))
        return made[-1]

    yield start
    for each in made:
        for end in each.pulses:
            end.close()


def test_several_that_are_silent_are_named_together(run: Callable[[int], Ranks]) -> None:
    ranks = run(3)
    ranks.join(1)
    ranks.join(2)
    error = lost(ranks.zero)
    names = f"{AWAY.format(1)} and {AWAY.format(2)}"
    silent = r": no heartbeat for \d+ and \d+ s; killed, perhaps for lack of memory, "
    assert re.match(re.escape(names) + silent, str(error))
    assert error is not None
    assert (error.exit_code, error.common) == (3, False)


def test_a_rank_that_is_lost_and_does_not_end_is_ended(
    run: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its library may wait for ever for the one that is gone."""
    monkeypatch.setattr(pulse, "GRACE", 0.1)
    ranks, died = run(2), Queue[RanksError]()
    ranks.zero.die = died.put
    ranks.join(1)
    assert died.get(timeout=TIMEOUT_S) is ranks.zero.lost


def test_a_word_comes_before_silence_and_is_heard_before_all_seem_to_be_there(
    run: Callable[[int], Ranks],
) -> None:
    ranks = run(3)
    ranks.join(1)
    ranks.real(2, starts=False).leave("out of memory", 5)
    with pytest.raises(RanksError, match=r"^rank 2 \(process \d+ on \S+\) ended: out of memory\.$") as caught:
        launch.meet(ranks.zero, TIMEOUT_S)
    assert (caught.value.exit_code, caught.value.common) == (5, True)


def test_ranks_that_never_come_are_named_on_all(
    run: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "WORD", 1.0)
    ranks = run(4)
    other = ranks.real(2)
    with pytest.raises(RanksError, match=r"^ranks 1 and 3 did not join within 0 s: ") as error:
        launch.meet(ranks.zero, 0.3)
    ranks.zero.leave(str(error.value), 3)
    with pytest.raises(RanksError, match=r"^rank 0 .* ended: ranks 1 and 3 did not join within "):
        launch.meet(other, TIMEOUT_S)


def test_rank_0_waits_for_those_that_have_not_heard_why_it_ends(
    run: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "WORD", TIMEOUT_S)
    ranks = run(3)
    leaving = threading.Thread(target=ranks.zero.leave, args=("the card is gone", 3), daemon=True)
    leaving.start()
    for rank in (1, 2):
        assert leaving.is_alive()
        with pytest.raises(RanksError, match=r"^rank 0 \(process \d+ on \S+\) ended: the card is gone\.$"):
            launch.meet(ranks.real(rank), TIMEOUT_S)
    leaving.join(TIMEOUT_S)
    assert not leaving.is_alive()


@pytest.mark.parametrize("rank", [1, 2])
def test_a_rank_of_another_run_is_refused_before_it_writes_anything(
    run: Callable[[int], Ranks], rank: int
) -> None:
    """Also one whose number is not taken yet."""
    ranks = run(2)
    time.sleep(5 * pulse.BEAT)  # whatever rank 0 writes is there
    kept = ranks.store.num_keys()
    with pytest.raises(RanksError, match=r"^another run, of 2 ranks, uses this port: set MASTER_PORT"):
        launch.enter(ranks.connect(), rank, 4, TIMEOUT_S)
    assert ranks.store.num_keys() == kept
    launch.meet(ranks.real(1), TIMEOUT_S)
    assert lost(ranks.zero, 0.2) is None


def test_a_rank_0_that_never_joins_is_named(
    run: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under torchrun the store is there without it, and without it nobody else says why a rank ends."""
    tcp = vars(torch.distributed)["TCPStore"]
    store = tcp("127.0.0.1", 0, None, True, timedelta(seconds=TIMEOUT_S), wait_for_workers=False)
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for name, value in {**variables, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "_unreached", False)
    kept = store.num_keys()
    with pytest.raises(RanksError, match=r"^rank 0 did not join within 0 s: check the output there\.$"):
        launch.connect(0.3)
    assert store.num_keys() == kept
    assert not launch.leave_word("rank 0 did not join", 3)


def test_a_rank_0_that_has_ended_first_is_not_missed(
    run: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All has gone well, and this rank's libraries still take their time."""
    ranks = run(2)
    store = Broken(ranks.connect())
    crew = Crew.__new__(Crew)
    crew._pulse = ranks.real(1, store=store)
    launch.meet(crew._pulse, TIMEOUT_S)

    closed: list[bool] = []
    destroy = lambda: closed.append(crew._pulse._closed.is_set())  # noqa: E731
    monkeypatch.setattr(torch.distributed, "destroy_process_group", destroy)
    monkeypatch.setattr(pulse, "BEAT", TIMEOUT_S)
    monkeypatch.setattr(pulse, "WORD", TIMEOUT_S)
    with crew:
        store.fails = True
        time.sleep(0.2)  # its next beat fails meanwhile
    assert closed == [True]
    assert not crew._pulse._thread.is_alive()
    assert crew._pulse.lost is None


class Broken:
    """A store that answers late, or not, or raises, once it is told to."""

    def __init__(self, store: Any) -> None:
        self._store, self.fails, self.answers = store, False, threading.Event()
        self.answers.set()

    def __getattr__(self, name: str) -> Any:
        if self.fails:
            raise RuntimeError("Connection reset by peer")
        self.answers.wait(TIMEOUT_S)
        return getattr(self._store, name)


@pytest.mark.parametrize("fails", [True, False], ids=["gone", "silent"])
def test_a_store_that_is_gone_or_does_not_answer_is_rank_0s(
    run: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr(pulse, "WORD", 0.1)
    ranks = run(2)
    store = Broken(ranks.connect())
    other = ranks.real(1, store=store)
    launch.meet(other, TIMEOUT_S)
    store.fails = fails
    store.answers.clear()
    said = str(lost(other))
    store.answers.set()
    cause = r" has ended or was killed: " if fails else r": no heartbeat for \d+ s; killed, "
    assert re.match(r"rank 0 \(process .*\)" + cause, said)


def test_a_rank_ends_in_time_where_the_store_does_not_answer(
    run: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That keeps the exit code: no other reason is found meanwhile."""
    for name, seconds in (("WORD", 0.3), ("SILENT", TIMEOUT_S)):
        monkeypatch.setattr(pulse, name, seconds)
    ranks = run(2)
    store = Broken(ranks.connect())
    other = ranks.real(1, store=store)
    launch.meet(other, TIMEOUT_S)
    store.answers.clear()
    leaving = threading.Thread(target=other.leave, args=("interrupted", 130), daemon=True)
    leaving.start()
    leaving.join(TIMEOUT_S / 2)
    ended = not leaving.is_alive()
    store.answers.set()
    assert ended
    assert lost(other, 0.0) is None


@pytest.mark.parametrize(
    ("places", "named"),
    [([2, 1, 2], [1]), ([1, 4, 1], [0, 2]), ([3, 3, 3], [])],  # where all wait, the library hangs
)
def test_those_that_are_the_least_far_keep_the_others_waiting(
    run: Callable[[int], Ranks], places: list[int], named: list[int]
) -> None:
    ranks = run(3)
    for rank in (1, 2):
        ranks.real(rank)
    for each, place in zip(ranks.pulses, places, strict=True):
        each.place = partial(int, place)
    launch.meet(ranks.zero, TIMEOUT_S)
    time.sleep(10 * pulse.BEAT)
    names = ranks.zero.behind()
    assert [rank for rank in range(3) if f"rank {rank} (process " in names] == named


@pytest.mark.parametrize(
    ("far", "farther"),
    [
        ((5, 2, 1, False), (5, 2, 2, False)),  # in a collective, and behind it
        ((5, 2, 2, False), (5, 3, 2, False)),  # it computes while the other waits in the next one
        ((5, 2, 2, False), (5, 2, 2, True)),  # ... and where the other has done its part
        ((5, 9, 9, True), (6, 9, 9, False)),
    ],
)
def test_a_rank_is_as_far_as_its_forward_its_collectives_and_its_word(
    far: tuple[int, int, int, bool], farther: tuple[int, int, int, bool]
) -> None:
    places = []
    for forwards, entered, left, talks in (far, farther):
        crew: Any = Crew.__new__(Crew)
        crew._forwards, crew._before, crew._talks = forwards, 1, talks
        crew.groups = SimpleNamespace(entered=entered, left=left)
        places.append(crew._place())
    assert places[0] < places[1]
