"""Whatever happens to a rank, all others end, say which one it was, and keep what was finished."""

from __future__ import annotations

import re
import signal
import socket
import time
from typing import Any

import pytest
from ranks_of_a_run import BOUND, FAULTY, IMPATIENT, SILENT, Start

from benchmarks.ranks.processes import free_port
from mla.bench import results

# Long enough to be in it when something happens.
ENDLESS_RUN = ("--parallel", "tp=2", "-o", "run.json", "--passes", "1000000", "--warmups", "0")


def when_said(ranks: Any, words: str, rank: int = 0) -> None:
    """Wait until a rank has said this on stderr."""
    limit = time.monotonic() + BOUND
    while words not in ranks.err(rank):
        assert time.monotonic() < limit, ranks.err(rank)
        assert ranks.code(rank) is None, ranks.err(rank)
        time.sleep(0.02)


def errors(ranks: Any) -> list[str]:
    """Return the complaints of each rank."""
    said = [ranks.err(rank).splitlines() for rank in range(len(ranks.pids))]
    return ["".join(line for line in lines if "error: " in line) for lines in said]


def test_when_rank_0_is_killed_the_others_say_so(start: Start) -> None:
    ranks = start(*ENDLESS_RUN, "--scenario", "prefill")
    when_said(ranks, "plan ")
    ranks.send(0, signal.SIGKILL)
    assert ranks.wait(BOUND) == [-9, 3]
    assert errors(ranks)[1].startswith(f"rank 1: error: rank 0 (process {ranks.pids[0]} on ")
    assert ") has ended or was killed: " in errors(ranks)[1]


def test_cases_finished_before_are_kept_and_shown(start: Start) -> None:
    ranks = start("--parallel", "tp=2", "-o", "run.json", "--scenario", "prefill", "-a", "batch=1..40+1")
    when_said(ranks, "2 of 40")
    ranks.send(1, signal.SIGKILL)
    assert ranks.wait(BOUND) == [3, -9]
    assert errors(ranks)[0].startswith(f"error: rank 1 (process {ranks.pids[1]} on ")
    assert "killed, perhaps" in errors(ranks)[0]
    kept = results.read(ranks.folder / "run.json").cases
    assert len([case for case in kept if case.latency_ms]) >= 2
    assert all(case.scenario in ranks.out() for case in kept)


def test_all_that_are_killed_at_once_are_named_by_all_that_live(start: Start) -> None:
    ranks = start("--parallel", "tp=4", *ENDLESS_RUN[2:], "--scenario", "decode", world=4)
    when_said(ranks, "plan ")
    for rank in (1, 3):
        ranks.send(rank, signal.SIGKILL)
    assert ranks.wait(BOUND) == [3, -9, 3, -9]
    for said in (errors(ranks)[0], errors(ranks)[2]):  # and that rank 0 has ended is no reason
        assert f"error: rank 1 (process {ranks.pids[1]} on " in said
        assert f" and rank 3 (process {ranks.pids[3]} on " in said
        assert "; killed, perhaps for lack of memory, " in said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_missed_and_ends_when_it_wakes_up(start: Start, rank: int) -> None:
    """Rank 0 holds the store, which then does not answer."""
    words = ("-O", "fault=hangs", "-O", f"rank={rank}", "-O", "call=3")
    ranks = start(*ENDLESS_RUN, *words, backend=FAULTY, constants=IMPATIENT)
    other = 1 - rank
    assert ranks.wait(BOUND, [other])[other] == 3
    assert ranks.code(rank) is None
    assert f"error: rank {rank} (process " in errors(ranks)[other]
    silent = re.search(r": no heartbeat for (\d+) s; killed, perhaps", errors(ranks)[other])
    assert silent
    assert int(silent[1]) >= SILENT
    ranks.send(rank, signal.SIGCONT)
    assert ranks.wait(BOUND) == [3, 3]


def test_a_rank_0_that_is_stopped_before_all_have_met_is_missed(start: Start) -> None:
    """They wait for two that never come."""
    port = free_port()
    constants = {**IMPATIENT, "mla.bench.ranks.launch.MEETING": 6.0}
    ranks = start("--parallel", "tp=4", constants=constants, WORLD_SIZE="4", MASTER_PORT=str(port))
    with socket.socket() as probe:
        while probe.connect_ex(("127.0.0.1", port)):
            assert ranks.code(0) is None, ranks.err(0)
            time.sleep(0.02)
    ranks.send(0, signal.SIGSTOP)
    assert ranks.wait(BOUND, [1])[1] == 3
    (said,) = (line for line in errors(ranks)[1].splitlines() if line.startswith("rank 1: error: rank 0"))
    assert "stopped, or " in said


@pytest.mark.parametrize("layout", ["tp=2", "dp=2"])  # which has no collectives
def test_a_rank_that_hangs_in_an_op_is_named(start: Start, layout: str) -> None:
    words = ("-O", "fault=waits", "-O", "rank=1", "-O", "call=9", "--hang-after", "2s")
    ranks = start("--parallel", layout, *ENDLESS_RUN[2:], *words, backend=FAULTY, constants=IMPATIENT)
    assert ranks.wait(BOUND) == [3, 3]
    assert f"rank 1 (process {ranks.pids[1]} on " in errors(ranks)[0]
    assert "--hang-after" in errors(ranks)[0]
    assert errors(ranks)[1] == ""  # rank 0 has said it, and was not killed


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_raises_ends_all(start: Start, rank: int) -> None:
    words = ("-O", "fault=raises", "-O", f"rank={rank}", "-O", "call=3")
    ranks = start("--parallel", "tp=2", *words, backend=FAULTY)
    assert ranks.wait(BOUND) == [3, 3]
    first, second = errors(ranks)
    assert "the card fell off the bus" in first
    if rank == 0:
        assert second == ""  # rank 0 has said it
    else:
        assert first.startswith("error: rank 1 (process ")
        assert second.startswith("rank 1: error: ")
        assert "the card fell off the bus" in second


@pytest.mark.parametrize(
    ("to", "number", "code", "word"),
    [
        ([0], signal.SIGTERM, 143, "SIGTERM"),
        ([1], signal.SIGTERM, 143, "SIGTERM"),
        ([1], signal.SIGHUP, 129, "SIGHUP"),
        ([0, 1], signal.SIGINT, 130, "interrupted"),
    ],
)
def test_an_interrupted_rank_ends_all(
    start: Start, to: list[int], number: signal.Signals, code: int, word: str
) -> None:
    ranks = start(*ENDLESS_RUN, "--scenario", "decode")
    when_said(ranks, "plan ")
    for rank in to:
        ranks.send(rank, number)
    assert ranks.wait(BOUND) == [code, code], (ranks.err(0), ranks.err(1))
    assert word in ranks.err(0).splitlines()[-1]
    assert ranks.err(1) == ""


def test_a_run_at_the_port_of_another_leaves_it_alone(start: Start, start_ranks: Start) -> None:
    port = str(free_port())
    first = start(*ENDLESS_RUN, MASTER_PORT=port)
    when_said(first, "plan ")
    second_folder = first.folder / "second"
    second_folder.mkdir()
    words = ["--backend", "cpu", "--parallel", "tp=2"]
    second = start_ranks(words, second_folder, MASTER_PORT=port)
    assert second.wait(BOUND) == [3, 3]
    assert "set MASTER_PORT" in errors(second)[0]
    assert "another run has a rank 1 at this port" in errors(second)[1]
    assert (first.code(0), first.code(1)) == (None, None)
    first.send(1, signal.SIGINT)
    assert first.wait(BOUND) == [130, 130]
