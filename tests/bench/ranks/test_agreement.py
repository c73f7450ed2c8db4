"""A run over several ranks is one run, with one result; ranks that cannot be one say so, once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import checkpoint_maker as maker
import pytest
from ranks_of_a_run import BOUND, FAULTY, Start
from tiny_run import DIMS, write_tiny_run

from mla.bench import results
from mla.bench.ranks.crew import agree
from mla.errors import RanksError


@pytest.mark.parametrize(
    ("more", "code", "sentence"),
    [
        (["--seed", "1"], 3, "rank 1 differs from rank 0 in --seed (1, not 0)"),
        (["--runs", "none"], 2, "rank 1 (process 1234 on host) ended: Invalid value for '--runs'"),
        (["-O", "nonsense=1"], 2, "rank 1 (process 1234 on host) ended: "),
    ],
)
def test_a_rank_with_another_configuration_is_named(
    start: Start, more: list[str], code: int, sentence: str
) -> None:
    ranks = start("--parallel", "tp=2", rank_words={1: more})
    assert ranks.wait(BOUND) == [code, code], (ranks.err(0), ranks.err(1))
    said = re.sub(r"\(process \d+ on [^)]+\)", "(process 1234 on host)", ranks.err(0).splitlines()[-1])
    assert said.startswith(f"error: {sentence}")
    assert ranks.err(1) == ""


def test_what_rank_0_alone_reads_may_differ(start: Start) -> None:
    """Where it writes, what it prints, and how it judges."""
    ranks = start(
        "--parallel", "tp=2", rank_words={0: ["-o", "run.json", "--strict", "--format", "md"], 1: ["--quiet"]}
    )
    assert ranks.wait(BOUND)[1] in (0, 6), (ranks.err(0), ranks.err(1))
    assert "differs" not in ranks.err(0) + ranks.err(1)


def test_ranks_with_other_numbers_of_threads_are_named(start: Start) -> None:
    """An efficiency divides by the threads of rank 0 as if all had them."""
    ranks = start("--parallel", "tp=2", backend=FAULTY, RANK_THREADS="1{rank}")
    assert ranks.wait(BOUND) == [3, 3], (ranks.err(0), ranks.err(1))
    said = ranks.err(0).splitlines()[-1]
    assert said.startswith("error: rank 1 differs from rank 0 in threads of --threads, OMP_NUM_THREADS or ")
    assert "`srun --cpus-per-task` (11, not 10): all need the same" in said
    assert ranks.err(1) == ""


def _config(folder: Path, copy: int) -> None:
    write_tiny_run(folder, kv_lora_rank=16 + 16 * copy, v_head_dim=8)


def _checkpoint(folder: Path, copy: int) -> None:
    maker.LAYOUTS["whole-layer"].make(folder / "model", seed=copy)


@pytest.mark.parametrize(
    ("write", "words", "sentence"),
    [
        (_config, (), "rank 1 differs from rank 0 in config's kv_lora_rank (32, not 16): all need the same"),
        (_checkpoint, ("--model-path", "model"), "rank 1 differs from rank 0 in q_a_proj.weight ("),
    ],
)
def test_a_rank_whose_files_of_the_same_name_hold_something_else_is_named(
    start_ranks: Start,
    tmp_path: Path,
    write: Callable[[Path, int], None],
    words: tuple[str, ...],
    sentence: str,
) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for copy, folder in enumerate(folders):
        folder.mkdir()
        common = write_tiny_run(folder)
        write(folder, copy)
    given = [*(common[2:] if words else common), *words, "--implementations", "mla", "--parallel", "tp=2"]
    ranks = start_ranks(["--backend", "cpu", *given], folders[0], folders=dict(enumerate(folders)))
    said = ranks.wait(BOUND), ranks.err(0), (folders[1] / "err1.txt").read_text()
    assert said[0] == [3, 3], said
    assert said[1].splitlines()[-1].startswith(f"error: {sentence}")
    assert said[2] == ""


def test_every_rank_that_has_something_else_is_named() -> None:
    alike = {"mla": "1", "config's heads": "4"}
    with pytest.raises(RanksError, match=r"^ranks 1 and 3 differ from rank 0 in mla \(0, not 1\): all need "):
        agree([alike, {**alike, "mla": "0"}, alike, {**alike, "mla": "0"}])
    with pytest.raises(RanksError, match=r"^rank 2 differs from rank 0 in 'tuning' \(2, not None\): "):
        agree([alike, alike, {**alike, "'tuning'": "2"}])
    agree([alike, alike])


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("--parallel", "tp=4"), 2, "--parallel tp=4 needs 4 processes, and 2 were started"),
        (("--parallel", "dp=2", "-a", "batch=1"), 2, " has 1: add requests, or lower dp to 1."),
    ],
)
def test_what_all_ranks_have_wrong_is_said_once(
    start: Start, words: tuple[str, ...], code: int, sentence: str
) -> None:
    ranks = start(*words)
    assert ranks.wait(BOUND) == [code, code]
    assert sentence in ranks.err(0).splitlines()[-1]
    assert ranks.err(1) == ""


def test_a_backend_without_collectives_is_refused(start: Start) -> None:
    ranks = start("--parallel", "tp=2", "-O", "library=none", backend=FAULTY)
    assert ranks.wait(BOUND) == [3, 3]
    assert "has no collectives" in ranks.err(0)
    assert ranks.err(1) == ""


def test_all_ranks_run_the_ops_that_rank_0_chose(start: Start) -> None:
    words = ("-O", "choice=rank", "-O", "fault=scale", "-O", "rank=1", "-o", "run.json")
    ranks = start("--parallel", "tp=2", "--scenario", "decode", *words, backend=FAULTY)
    assert ranks.wait(BOUND) == [0, 0], ranks.err(0)
    assert results.read(ranks.folder / "run.json").cases[0].ops["o_proj"] == "right_linear"


def test_each_op_in_turns_is_each_of_rank_0(start: Start) -> None:
    words = ("-O", "choice=rank", "--implementations", "mla[o_proj=*]", "-o", "run.json")
    ranks = start("--parallel", "tp=2", "--scenario", "decode", *words, backend=FAULTY)
    assert ranks.wait(BOUND) == [0, 0], (ranks.err(0), ranks.err(1))
    ops = [case.ops["o_proj"] for case in results.read(ranks.folder / "run.json").cases]
    assert ops == ["right_linear", "faulty_linear"]


def test_a_wrong_rank_is_named(start: Start) -> None:
    words = ("-O", "fault=scale", "-O", "rank=1")
    ranks = start("--parallel", "dp=2", "--scenario", "decode", "-o", "run.json", *words, backend=FAULTY)
    assert ranks.wait(BOUND) == [4, 4]
    case = results.read(ranks.folder / "run.json").cases[0]
    assert case.check.reason.startswith("on rank 1: ")
    assert "Decode Throughput" not in ranks.out()


# ------------------------------------------------------------------------------------- ranks that are one run


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
