"""Evidence against outputs and times that speak well of every rank at first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from opponents.base import CONFIG
from ranks_of_a_run import BOUND, Start
from tiny_run import write_tiny_run

from mla.bench import results
from mla.bench.measure.evidence import TUPLES

# Few requests have few turns, and so many forwards come back to all of them.
PROMPT = """
[[scenario]]
name = "prompt"
mode = "prefill"
query_lens = [24, 20]
history = [50, 30]
runs = 450
passes = 15
warmups = 2
"""


def test_who_answers_new_inputs_from_memory_has_no_number(start: Start, tmp_path: Path) -> None:
    """All inputs of the passes are known by then, and answered rightly."""
    write_tiny_run(tmp_path, **CONFIG)
    (tmp_path / "tiny.toml").write_text(PROMPT)
    words = ("--parallel", "dp=2", "--attention", "absorbed", "-o", "run.json", "-O", "idle=300")
    ranks = start(*words, backend="rank_refusals:Remembering", DOUBT_TIMES="1")
    codes = ranks.wait(2 * BOUND)
    (case,) = results.read(ranks.folder / "run.json").cases
    assert codes == [6, 6], (codes, ranks.err(), case.check)
    assert "on fresh inputs" in case.check.reason
    assert case.latency_ms is None


# Without warm-ups, whose number depends on the machine, the checked pass is over by call 40.
LATER = [
    "-O",
    "fault=scale",
    "-O",
    "call=40",
    "-O",
    "rank=1",
    "--passes",
    "12",
    "--scenario",
    "decode",
    "--warmups",
    "0",
]


@pytest.mark.parametrize(
    ("layout", "where"),
    [("dp=2", "on rank 1: "), ("tp=2", "on ranks 0 and 1, which hold one sum: any may be at fault: ")],
)
def test_a_rank_that_is_wrong_in_later_passes_alone_is_found(start: Start, layout: str, where: str) -> None:
    words = ("--parallel", layout, "-o", "run.json", *LATER)
    ranks = start(*words, backend="rank_faults:FaultyRank")
    assert ranks.wait(BOUND) == [4, 4], ranks.err()
    (case,) = results.read(ranks.folder / "run.json").cases
    assert case.check.status == "wrong"
    assert case.check.reason.startswith("right at first, wrong in pass ")
    assert where in case.check.reason
    assert case.latency_ms is None


LENGTHS = """
[[scenario]]
name = "lengths"
mode = "prefill"
query_lens = [2, 3]
history = [32, 45]
runs = 2
passes = 2
warmups = 1
"""


@pytest.mark.parametrize("layout", ["tp=2", "dp=2"])
def test_every_rank_runs_its_part_of_new_lengths(start: Start, tmp_path: Path, layout: str) -> None:
    """Of `dp`, rank 1 alone has the request whose lengths may be refused."""
    (tmp_path / "tiny.toml").write_text(LENGTHS)
    words = ("--parallel", layout, "--attention", "absorbed", "-o", "run.json", "-O", "picky=yes")
    ranks = start(*words, backend="rank_refusals:Noting")
    assert ranks.wait(BOUND) == [0, 0], ranks.err()
    (case,) = results.read(tmp_path / "run.json").cases
    tried = [(tmp_path / f"lengths{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    new = [{tuple(map(tuple, json.loads(line))) for line in lines} for lines in tried]
    unseen = case.new_lengths
    assert unseen is not None
    assert 0 < unseen.forwards <= TUPLES
    planned = ((2, 3), (34, 48))
    parts = [planned] * 2 if layout == "tp=2" else [((2,), (34,)), ((3,), (48,))]
    assert all(part in lengths for part, lengths in zip(parts, new, strict=True))
    assert min(len(lengths) for lengths in new) > unseen.forwards  # these and the scenario's own
    assert layout == "dp=2" or new[0] == new[1]


def test_where_new_lengths_cannot_be_tried_the_run_says_so(start: Start) -> None:
    ranks = start("--parallel", "dcp=2", "--scenario", "decode", "-o", "run.json", "-v")
    assert ranks.wait(BOUND) == [0, 0], ranks.err()
    assert results.read(ranks.folder / "run.json").cases[0].new_lengths is None
    assert "decode, mla: unseen lengths were not tried with dcp=2" in ranks.out()
