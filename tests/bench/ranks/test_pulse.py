"""Who is missed, and what is said of several: over a real store, of ranks of which some do not run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch.distributed as dist

from mla.bench.ranks import pulse
from mla.bench.ranks.errors import RankLost
from mla.bench.ranks.pulse import Ended, Member, Place, Pulse, leave
from mla.parallel.layout import Layout

PATIENCE = 60.0  # seconds
AWAY = Member("elsewhere", 7, "another kernel")
NAMES = "rank 1 (process 7 on elsewhere) and rank 2 (process 7 on elsewhere)"


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RankLost]]:
    """Return a function from other ranks, and from words that were left, to what rank 0 finds lost."""
    monkeypatch.setattr(pulse, "BEAT", 0.02)
    monkeypatch.setattr(pulse, "SILENT", 0.3)
    watching: list[Pulse] = []

    def lost(*others: Member, words: Any = None) -> RankLost:
        store = dist.HashStore()  # type: ignore[attr-defined]
        for rank, word in (words or {}).items():
            leave(store, rank, word)
        watching.append(Pulse(0, [pulse.this_process(), *others], store, lambda found: None))
        found = watching[-1].lost(PATIENCE)
        assert found is not None
        return found

    yield lost
    for one in watching:
        one.close()


@pytest.fixture
def ended_here() -> Member:
    """Return a process of this host that is not there any more."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return msgspec.structs.replace(pulse.this_process(), pid=process.pid)


def test_several_that_are_silent_are_named_together(lost: Callable[..., RankLost]) -> None:
    found = lost(AWAY, AWAY)
    assert str(found) == f"{NAMES} have not been heard of for 0 s: they, or their nodes, are gone or stopped."
    assert (found.exit_code, found.ranks, found.common) == (3, [1, 2], False)


def test_one_that_is_gone_is_told_from_those_that_are_silent(
    lost: Callable[..., RankLost], ended_here: Member
) -> None:
    here = msgspec.structs.replace(pulse.this_process(), pid=os.getpid())
    found = lost(ended_here, here, AWAY)
    assert str(found).startswith(f"rank 1 (process {ended_here.pid} on ")
    assert "is gone: it was killed" in str(found)
    assert "rank 2" not in str(found)


def test_all_that_say_the_same_are_named_and_a_word_comes_before_silence(
    lost: Callable[..., RankLost], ended_here: Member
) -> None:
    word, other = Ended("out of memory", 3), Ended("something else", 4)
    found = lost(AWAY, AWAY, ended_here, words={1: word, 2: word, 3: other})
    assert str(found) == f"{NAMES} ended: out of memory."
    assert (found.exit_code, found.ranks, found.common) == (3, [1, 2], True)


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
        ("dp=2,tp=2", [Place(4, True, 9, 8), Place(4, True, 8, 8), WAITS, WORKS], [1, 3]),
        ("tp=2,dcp=2", [Place(4, True, 3, 2), Place(4, True, 3, 2), WAITS, WORKS], [3]),  # 2 waits for 3
    ],
)
def test_only_those_are_late_for_whom_others_wait(layout: str, places: list[Place], late: list[int]) -> None:
    """Ranks of another part of `dp` have collectives, requests and thus numbers of their own."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    for rank, place in enumerate(places):
        store.set(f"beat/{rank}", "7 {} {:d} {} {}".format(*place))
    watching = Pulse(0, [pulse.this_process()] * len(places), store, lambda found: None)
    watching.groups, watching.place = Layout.parse(layout).head_groups(), lambda: places[0]
    said = watching.behind()
    watching.close()
    assert [rank for rank in range(len(places)) if f"rank {rank} " in said] == late
