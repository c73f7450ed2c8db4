"""Who is missed, and what is said of several: ranks of one process, which share a store."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import msgspec
import pytest
import torch

from mla.bench.ranks import launch, pulse
from mla.bench.ranks.crew import Crew
from mla.bench.ranks.pulse import Beat, Member, Place, Pulse, RanksError, Word

TIMEOUT_S = 60.0
ELSEWHERE = Member("elsewhere", 7)
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

    def real(self, rank: int, word: Word | None = None, store: Any = None, seed: int = 0) -> Pulse:
        """Have a rank join that beats."""
        store, run = (
            self.connect() if store is None else store,
            pulse.Run(self.world, "", {"--seed": str(seed)}),
        )
        self.pulses.append(Pulse(rank, run, store, lambda lost: None, word, TIMEOUT_S))
        return self.pulses[-1]

    def join(self, rank: int, word: Word | None = None, member: Member = ELSEWHERE) -> None:
        """Have a rank join that then does nothing."""
        self.store.set(f"beat/{rank}", msgspec.json.encode(Beat(1)))
        if word:
            self.store.set(f"word/{rank}", msgspec.json.encode(word))
            self.store.add("words", 1)
        self.store.set(f"member/{rank}", msgspec.json.encode(member))


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
    lost = ranks.zero.lost(TIMEOUT_S)
    names = f"{AWAY.format(1)} and {AWAY.format(2)}"
    assert str(lost) == f"{names}: no heartbeat for 0 s; stopped, or the node is gone."
    assert lost is not None
    assert (lost.exit_code, lost.common) == (3, False)


def test_a_process_that_is_gone_is_named_by_all_and_no_other(
    run: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch
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


def test_a_process_that_ends_after_its_last_beat_is_not_missed(run: Callable[[int], Ranks]) -> None:
    ranks = run(2)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        ranks.join(1, member=Member(ranks.zero.members[0].host, process.pid))
        ranks.zero.meet(TIMEOUT_S)
        ranks.store.set("beat/1", pulse.BYE)
        process.kill()
    assert ranks.zero.lost(1.0) is None


def test_who_cannot_be_seen_from_here_is_not_looked_for(
    run: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers may share a host's name, and number processes of their own."""
    monkeypatch.setattr(pulse, "SILENT", TIMEOUT_S)
    ranks = run(2)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    ranks.join(1, member=Member(ranks.zero.members[0].host, process.pid))
    ranks.zero.meet(TIMEOUT_S)
    assert ranks.zero.lost(0.5) is None


def test_all_that_say_the_same_are_named_and_a_word_comes_before_silence(run: Callable[[int], Ranks]) -> None:
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
    run: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "WORD", 1.0)
    ranks = run(4)
    other = ranks.real(2)
    with pytest.raises(RanksError, match=r"^ranks 1 and 3 did not join within 0 s: "):
        ranks.zero.meet(0.3)
    with pytest.raises(RanksError, match=r"^rank 0 .* ended: ranks 1 and 3 did not join within "):
        other.meet(TIMEOUT_S)


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
            ranks.real(rank).meet(TIMEOUT_S)
    leaving.join(TIMEOUT_S)
    assert not leaving.is_alive()


def test_a_second_rank_of_one_number_is_refused_and_the_first_goes_on(run: Callable[[int], Ranks]) -> None:
    ranks = run(2)
    ranks.real(1).meet(TIMEOUT_S)
    with pytest.raises(RanksError, match=r"^another run has a rank 1 at this port: set MASTER_PORT"):
        ranks.real(1)
    assert ranks.zero.lost(0.2) is None


OTHER_OPTIONS = r"^rank 1 differs from rank 0 in options: --seed \(1, not 0\); start all ranks with the same"


def test_a_rank_with_other_options_is_of_another_run_if_the_right_one_comes(
    run: Callable[[int], Ranks],
) -> None:
    ranks = run(2)
    with pytest.raises(RanksError, match=OTHER_OPTIONS):
        ranks.real(1, seed=1)
    ranks.real(1).meet(TIMEOUT_S)
    ranks.zero.meet(TIMEOUT_S)
    assert ranks.zero.lost(0.2) is None


def test_a_rank_with_other_options_is_named_if_no_other_comes(
    run: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "STRANGER", 0.1)
    ranks = run(2)
    with pytest.raises(RanksError, match=OTHER_OPTIONS):
        ranks.real(1, seed=1)
    with pytest.raises(RanksError, match=OTHER_OPTIONS) as lost:
        ranks.zero.meet(TIMEOUT_S)
    assert lost.value.common, "rank 0 says it for all"


@pytest.mark.parametrize(("rank", "world", "launch"), [(2, 4, ""), (1, 4, ""), (1, 2, "8.0")])
def test_a_rank_of_another_run_is_refused_before_it_writes_anything(
    run: Callable[[int], Ranks], rank: int, world: int, launch: str
) -> None:
    """Also one that says why it ends, and one whose number is not taken yet."""
    ranks = run(2)
    other = pulse.Run(world, launch)
    time.sleep(5 * pulse.BEAT)  # whatever rank 0 writes is there
    kept = ranks.store.num_keys()
    with pytest.raises(RanksError, match=r"^another run, of 2 ranks, uses this port: set MASTER_PORT"):
        Pulse(rank, other, ranks.connect(), lambda lost: None, Word("no room", 2), TIMEOUT_S)
    assert ranks.store.num_keys() == kept
    ranks.real(1).meet(TIMEOUT_S)
    assert ranks.zero.lost(0.2) is None


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


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"TORCHELASTIC_RUN_ID": "a7", "RANK": "0", "SLURM_JOB_ID": "8"}, "a7"),
        ({"RANK": "0", "SLURM_JOB_ID": "8", "SLURM_STEP_ID": "1"}, ""),  # by hand, maybe in several jobs
        ({"SLURM_JOB_ID": "8", "SLURM_STEP_ID": "1"}, "8.1"),
        ({"SLURM_HET_JOB_ID": "8", "SLURM_JOB_ID": "9", "SLURM_STEP_ID": "1"}, "8.1"),  # one of its parts
        ({}, ""),
    ],
)
def test_a_run_has_the_name_that_all_its_ranks_are_given(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], name: str
) -> None:
    for key in ("TORCHELASTIC_RUN_ID", "RANK", "SLURM_HET_JOB_ID", "SLURM_JOB_ID", "SLURM_STEP_ID"):
        monkeypatch.delenv(key, raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert launch.launch_name() == name


def test_a_rank_0_that_has_ended_first_is_not_missed(
    run: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All has gone well, and this rank's libraries still take their time."""
    ranks = run(2)
    store = Broken(ranks.connect())
    crew = Crew.__new__(Crew)
    crew._pulse = ranks.real(1, store=store)
    crew._pulse.meet(TIMEOUT_S)

    def destroy() -> None:
        store.fails = True
        time.sleep(10 * pulse.BEAT)

    monkeypatch.setattr(torch.distributed, "destroy_process_group", destroy)
    with crew:
        pass
    assert store.fails
    assert crew._pulse.lost(0.0) is None


def test_a_heartbeat_that_fails_ends_the_run(run: Callable[[int], Ranks]) -> None:
    ranks = run(2)
    ranks.zero.place = lambda: 1 // 0  # type: ignore[assignment, return-value]
    lost = str(ranks.zero.lost(TIMEOUT_S))
    assert lost.startswith("rank 0 (process ")
    assert "): its heartbeat failed: " in lost


def test_words_of_no_rank_of_this_run_are_nobodys(run: Callable[[int], Ranks]) -> None:
    ranks = run(2)
    ranks.store.add("words", 1)
    ranks.real(1).meet(TIMEOUT_S)
    assert ranks.zero.lost(0.3) is None


def test_a_rank_that_ends_well_is_not_missed(run: Callable[[int], Ranks]) -> None:
    ranks = run(2)
    ranks.real(1).meet(TIMEOUT_S)
    ranks.pulses[1].close()
    assert ranks.zero.lost(1.0) is None


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
def test_a_store_that_is_gone_or_does_not_answer_is_rank_0s(run: Callable[[int], Ranks], fails: bool) -> None:
    ranks = run(2)
    store = Broken(ranks.connect())
    other = ranks.real(1, store=store)
    other.meet(TIMEOUT_S)
    store.fails = fails
    store.answers.clear()
    lost = str(other.lost(TIMEOUT_S))
    store.answers.set()
    assert lost.startswith(f"rank 0 (process {ranks.zero.members[0].pid} on ")
    assert (") has ended or was killed: " if fails else "): no heartbeat for 0 s; stopped, ") in lost


def test_a_rank_0_that_is_seen_to_be_gone_was_killed(
    run: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "BEAT", 0.5)  # a process that is killed closes its connections first
    ranks = run(2)
    store = Broken(ranks.connect())
    other = ranks.real(1, store=store)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        other.meet(TIMEOUT_S)
        other.members[0] = Member(other.members[1].host, process.pid)
        process.kill()
        store.fails = True
        lost = str(other.lost(TIMEOUT_S))
    assert lost.startswith(f"rank 0 (process {process.pid} on ")
    assert "): killed, perhaps" in lost


def test_a_rank_ends_in_time_where_the_store_does_not_answer(
    run: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That keeps the exit code: no other reason is found meanwhile."""
    for name, seconds in (("WORD", 0.3), ("SILENT", TIMEOUT_S)):
        monkeypatch.setattr(pulse, name, seconds)
    ranks = run(2)
    store = Broken(ranks.connect())
    other = ranks.real(1, store=store)
    other.meet(TIMEOUT_S)
    store.answers.clear()
    leaving = threading.Thread(target=other.leave, args=("interrupted", 130), daemon=True)
    leaving.start()
    leaving.join(TIMEOUT_S / 2)
    ended = not leaving.is_alive()
    store.answers.set()
    assert ended
    assert other.lost(0.0) is None


def test_rank_0_waits_for_one_that_looks_late(
    run: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORD", "SILENT"):
        monkeypatch.setattr(pulse, name, TIMEOUT_S)
    ranks = run(3)
    store = Broken(ranks.connect())
    late, third = ranks.real(1, store=store), ranks.real(2)
    for each in (late, third):
        each.meet(TIMEOUT_S)
    store.answers.clear()
    leaving = threading.Thread(target=ranks.zero.leave, args=("the card is gone", 3), daemon=True)
    leaving.start()
    assert third.lost(TIMEOUT_S) is not None
    third.close()
    leaving.join(30 * pulse.BEAT)
    assert leaving.is_alive()
    store.answers.set()
    assert str(late.lost(TIMEOUT_S)).endswith(" ended: the card is gone.")
    leaving.join(TIMEOUT_S)
    assert not leaving.is_alive()


def test_a_process_that_only_its_parent_has_to_collect_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        member = Member("here", process.pid)
        assert member.runs()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not member.runs()


@pytest.mark.parametrize(
    ("places", "named"),
    [
        ([(0, 5, 1), (1, 5, 1), (0, 5, 1)], [1]),
        ([(1, 5, 1), (0, 5, 2), (0, 5, 2)], [0]),
        ([(0, 5, 1), (1, 5, 1), (1, 5, 0)], [1, 2]),
        ([(0, 5, 2), (0, 5, 1), (0, 5, 2)], [1]),  # it has skipped a collective
        ([(0, 5, 0), (0, 5, 0), (0, 4, 2)], [2]),  # it has not come to where all meet
        ([(0, 5, 1)] * 3, []),  # where all wait, the library hangs
        ([(1, 5, 1)] * 3, []),  # where all compute, nobody knows
    ],
)
def test_those_are_late_that_compute_or_are_less_far_while_others_wait(
    run: Callable[[int], Ranks], places: list[tuple[int, int, int]], named: list[int]
) -> None:
    assert late(run(3), places) == named


def test_only_ranks_of_one_group_are_compared_by_their_collectives(run: Callable[[int], Ranks]) -> None:
    ranks = run(4)
    ranks.zero.groups = [[0, 1], [2, 3]]
    assert late(ranks, [(0, 5, 1), (0, 5, 1), (0, 5, 7), (0, 5, 6)]) == [3]


def late(ranks: Ranks, places: list[tuple[int, int, int]]) -> list[int]:
    """Return whom rank 0 takes to be late where each rank is busy or not, in that forward and collective."""
    for rank in range(1, ranks.world):
        ranks.real(rank)
    for each, (busy, forwards, entered) in zip(ranks.pulses, places, strict=True):
        each.place = partial(Place, bool(busy), forwards, entered)
    ranks.zero.meet(TIMEOUT_S)
    time.sleep(10 * pulse.BEAT)
    names = ranks.zero.behind()
    return [rank for rank in range(ranks.world) if f"rank {rank} (process " in names]
