"""Who is missed, and what is said of several: ranks of one process, which share a store."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch

from mla.bench.ranks import pulse
from mla.bench.ranks.pulse import Member, Pulse, RanksError, Word

TIMEOUT_S = 60.0
ELSEWHERE = Member("elsewhere", 7)
AWAY = "rank {} (process 7 on elsewhere)"


class Run:
    """Rank 0 of several, and others that join it."""

    def __init__(self, world: int) -> None:
        self.world, self.store = world, vars(torch.distributed)["HashStore"]()
        self.pulses: list[Pulse] = []
        self.zero = self.real(0)

    def real(self, rank: int, word: Word | None = None) -> Pulse:
        """Have a rank join that beats."""
        self.pulses.append(Pulse(rank, self.world, self.store, lambda lost: None, word))
        return self.pulses[-1]

    def join(self, rank: int, word: Word | None = None, member: Member = ELSEWHERE) -> None:
        """Have a rank join that then does nothing."""
        self.store.set(f"beat/{rank}", "[1,false]")
        if word:
            self.store.set(f"word/{rank}", msgspec.json.encode(word))
            self.store.add("words", 1)
        self.store.set(f"member/{rank}", msgspec.json.encode(member))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Run]]:
    """Return a function from a number of ranks to them."""
    monkeypatch.setattr(pulse, "BEAT", 0.02)
    monkeypatch.setattr(pulse, "SILENT", 0.5)
    made: list[Run] = []

    def start(world: int) -> Run:
        made.append(Run(world))
        return made[-1]

    yield start
    for each in made:
        for end in each.pulses:
            end.close()


def test_several_that_are_silent_are_named_together(run: Callable[[int], Run]) -> None:
    ranks = run(3)
    ranks.join(1)
    ranks.join(2)
    lost = ranks.zero.lost(TIMEOUT_S)
    names = f"{AWAY.format(1)} and {AWAY.format(2)}"
    assert str(lost) == f"{names}: no heartbeat for 0 s; stopped, or the node is gone."
    assert lost is not None
    assert (lost.exit_code, lost.common) == (3, False)


def test_a_process_that_is_gone_is_named_by_all_and_no_other(
    run: Callable[[int], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "SILENT", TIMEOUT_S)
    ranks = run(3)
    other = ranks.real(1)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        ranks.join(2, member=Member(ranks.zero.members[0].host, process.pid))
        ranks.zero.meet(TIMEOUT_S)
        other.meet(TIMEOUT_S)
        process.kill()
    for each in (ranks.zero, other):
        lost = str(each.lost(TIMEOUT_S))
        assert lost.startswith(f"rank 2 (process {process.pid} on ")
        assert lost.endswith("): killed, perhaps for lack of memory, or crashed.")


def test_a_process_that_ends_after_its_last_beat_is_not_missed(run: Callable[[int], Run]) -> None:
    ranks = run(2)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        ranks.join(1, member=Member(ranks.zero.members[0].host, process.pid))
        ranks.zero.meet(TIMEOUT_S)
        ranks.store.set("beat/1", pulse.BYE)
        process.kill()
    assert ranks.zero.lost(1.0) is None


def test_who_cannot_be_seen_from_here_is_not_looked_for(
    run: Callable[[int], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers may share a host's name, and number processes of their own."""
    monkeypatch.setattr(pulse, "SILENT", TIMEOUT_S)
    ranks = run(2)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    ranks.join(1, member=Member(ranks.zero.members[0].host, process.pid))
    ranks.zero.meet(TIMEOUT_S)
    assert ranks.zero.lost(0.5) is None


def test_all_that_say_the_same_are_named_and_a_word_comes_before_silence(run: Callable[[int], Run]) -> None:
    ranks = run(4)
    word = Word("out of memory", 5)
    for rank in (1, 2):
        ranks.join(rank, word)
    ranks.join(3)
    with pytest.raises(RanksError) as caught:
        ranks.zero.meet(TIMEOUT_S)
    assert str(caught.value) == f"{AWAY.format(1)} and {AWAY.format(2)} ended: out of memory."
    assert (caught.value.exit_code, caught.value.common) == (5, True)


def test_ranks_that_never_come_are_named_on_all(
    run: Callable[[int], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "WORD", 1.0)
    ranks = run(4)
    other = ranks.real(2)
    with pytest.raises(RanksError, match=r"^ranks 1 and 3 did not join within 0 s: "):
        ranks.zero.meet(0.3)
    with pytest.raises(RanksError, match=r"^rank 0 .* ended: ranks 1 and 3 did not join within "):
        other.meet(TIMEOUT_S)


def test_rank_0_waits_for_those_that_have_not_heard_why_it_ends(
    run: Callable[[int], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "WORD", TIMEOUT_S)
    ranks = run(3)
    leaving = threading.Thread(target=ranks.zero.leave, args=("the card is gone", 3), daemon=True)
    leaving.start()
    for rank in (1, 2):
        assert leaving.is_alive()
        with pytest.raises(RanksError, match=r"^rank 0 \(process \d+ on \S+\) ended: the card is gone\.$"):
            ranks.real(rank).meet(TIMEOUT_S)
    leaving.join(TIMEOUT_S)
    assert not leaving.is_alive()


def test_a_rank_of_another_run_is_refused_and_the_first_goes_on(run: Callable[[int], Run]) -> None:
    ranks = run(2)
    ranks.real(1).meet(TIMEOUT_S)
    second = ranks.real(1)
    with pytest.raises(RanksError, match=r"^another run has a rank 1 at this port: set MASTER_PORT"):
        second.meet(TIMEOUT_S)
    second.leave("it has no room", 2)
    assert ranks.zero.lost(0.2) is None


def test_a_rank_that_ends_well_is_not_missed(run: Callable[[int], Run]) -> None:
    ranks = run(2)
    ranks.real(1).meet(TIMEOUT_S)
    ranks.pulses[1].close()
    assert ranks.zero.lost(1.0) is None


@pytest.mark.parametrize("fails", [True, False], ids=["gone", "silent"])
def test_a_store_that_is_gone_or_does_not_answer_is_rank_0s(run: Callable[[int], Run], fails: bool) -> None:
    woken = threading.Event()

    class Broken:
        def __init__(self, store: Any) -> None:
            self.store, self.broken = store, False

        def __getattr__(self, name: str) -> Any:
            if self.broken and fails:
                raise RuntimeError("Connection reset by peer")
            if self.broken:
                woken.wait(TIMEOUT_S)
            return getattr(self.store, name)

    ranks = run(2)
    whole, ranks.store = ranks.store, Broken(ranks.store)
    other = ranks.real(1)
    other.meet(TIMEOUT_S)
    ranks.store.broken = True
    lost = str(other.lost(TIMEOUT_S))
    woken.set()
    assert lost.startswith(f"rank 0 (process {ranks.zero.members[0].pid} on ")
    assert ("): killed, " if fails else "): no heartbeat for 0 s; stopped, ") in lost
    ranks.store = whole


@pytest.mark.parametrize(
    ("busy", "named"),
    [([0, 1, 0], [1]), ([1, 0, 0], [0]), ([0, 1, 1], [1, 2]), ([0, 0, 0], []), ([1, 1, 1], [])],
)
def test_those_are_late_that_compute_while_others_wait(
    run: Callable[[int], Run], busy: list[int], named: list[int]
) -> None:
    """Where all wait, the library hangs; where all compute, nobody knows."""
    ranks = run(3)
    for rank in (1, 2):
        ranks.real(rank)
    for each, computes in zip(ranks.pulses, busy, strict=True):
        each.busy = lambda computes=computes: bool(computes)  # type: ignore[misc]
    ranks.zero.meet(TIMEOUT_S)
    time.sleep(10 * pulse.BEAT)
    found = ranks.zero.behind()
    assert [rank for rank in range(3) if f"rank {rank} (process " in found] == named
