"""A run over several ranks is one run, with one result: of the slowest rank, checked on all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks_of_a_run import BOUND, Start
from tiny_run import DIMS

from mla.bench import results


def run(start: Start, *words: str, **more: object) -> results.Run:
    """Start a run that must go well, and return its result."""
    ranks = start(*words, **more)
    assert ranks.wait(BOUND) == [0] * len(ranks.pids), ranks.err()
    assert ranks.err(1) == ranks.out(1) == ""
    return results.read(ranks.folder / "run.json")


QUANTISED = ("--cache-format", "fp8_ds_mla")  # each rank is judged by what it has stored


@pytest.mark.parametrize(
    ("layout", "words"),
    [("tp=2", ()), ("dcp=2", ()), ("dp=2", ()), ("dcp=2", QUANTISED), ("dp=2", QUANTISED)],
)
def test_one_result_has_every_ranks_samples(start: Start, layout: str, words: tuple[str, ...]) -> None:
    result = run(start, "--parallel", layout, "-o", "run.json", *words)
    assert [case.scenario.split()[0] for case in result.cases] == ["prefill", "decode"]
    for case in result.cases:
        assert case.check.status == "ok"
        assert case.latency_ms is not None
        assert case.spread is not None
        assert (case.spread.layout, case.spread.library) == (layout, "gloo")
        assert [rank.rank for rank in case.spread.ranks] == [0, 1]
        by_forward = zip(*(rank.samples for rank in case.spread.ranks), strict=True)
        assert case.latency_ms.samples == list(map(max, by_forward))
        talks = layout != "dp=2"
        assert all((rank.collective_bytes > 0) == talks for rank in case.spread.ranks)


def test_ranks_of_a_layer_that_selects_are_each_judged_by_their_own_selection(
    start: Start, tmp_path: Path
) -> None:
    indexer = {"model_type": "deepseek_v32", "q_lora_rank": 24, "index_n_heads": 3, "index_head_dim": 16}
    (tmp_path / "sparse.json").write_text(json.dumps({**DIMS, **indexer, "index_topk": 8}))
    words = ("--parallel", "tp=2", "--config", "sparse.json", "--index-format", "fp8", "-o", "run.json")
    for case in run(start, *words).cases:
        assert case.check.status == "ok"
        assert case.spread is not None
        assert all(rank.collective_bytes > 0 for rank in case.spread.ranks)


NO_TORCHRUN = dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS"))
SLURM = {"SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}", "SLURM_STEP_NUM_TASKS": "2", **NO_TORCHRUN}


def test_a_run_is_resumed_by_another_launcher_and_by_no_other_layout(start: Start, tmp_path: Path) -> None:
    common = ("--threads", "1", "--parallel", "tp=2")
    before = run(start, *common, "-o", "run.json")
    before.cases = before.cases[:1]
    results.write(before, tmp_path / "run.json")
    after = run(start, *common, "--resume", "run.json", **SLURM)
    assert after.cases[0].latency_ms == before.cases[0].latency_ms
    assert after.cases[0].spread == before.cases[0].spread
    assert [case.scenario for case in after.cases] == ["prefill", "decode"]
    assert [case.repro.split(" -m ")[0] for case in after.cases] == [
        "torchrun --nproc-per-node 2",
        "srun -n 2 python",
    ]
    other = start("--threads", "1", "--parallel", "dcp=2", "--resume", "run.json")
    assert other.wait(BOUND) == [2, 2]
    said = other.err().splitlines()[-1]
    assert "'run.json', it holds another run: " in said
    assert "--parallel was tp=2 and is dcp=2" in said
    assert other.err(1) == ""


def test_a_run_whose_time_is_over_is_cut_alike_on_all_ranks(start: Start) -> None:
    """The clock of rank 0 decides: others run what they are told."""
    over = {f"mla.bench.run.scheduler.{name}": 0.0 for name in ("TARGET_S", "MAX_S")}
    result = run(start, "--parallel", "tp=2", "-o", "run.json", constants=over)
    for case in result.cases:
        assert (case.passes, case.check.status) == (1, "ok")
        assert case.spread is not None
        assert {len(rank.samples) for rank in case.spread.ranks} == {case.steps_per_pass}
