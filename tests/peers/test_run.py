"""The command: an ordinary result file, every peer accounted for, faults counted, ratios the right way."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers import catalog, scaling, steady, summary
from benchmarks.peers.faults import FaultCounter
from benchmarks.peers.scenarios import scenario, scenarios
from mla.bench import results
from mla.bench.results.schema import Ceiling
from mla.bench.subjects.base import Facts, Implementation
from mla.bench.subjects.inputs import Inputs
from mla.bench.workload.scenario import Scenario
from mla.errors import ResultError, UsageError

RUN = Path(__file__).parents[2] / "benchmarks" / "peers" / "run.py"
DIMS = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], results.Run]:
    """Run the command once with a peer that is not there, and read its result."""
    folder = tmp_path_factory.mktemp("peers")
    (folder / "tiny.json").write_text(json.dumps(DIMS))
    words = ["--config", "./tiny.json", "--peers", "ours,read,hand,sglang", "--runs", "2", "--passes", "2"]
    done = subprocess.run(
        [sys.executable, str(RUN), *words, "-o", "out.json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done, results.read(folder / "out.json")


def test_every_peer_is_in_the_result(
    finished: tuple[subprocess.CompletedProcess[str], results.Run],
) -> None:
    _, run = finished
    found = [(case.scenario, case.implementation) for case in run.cases]
    assert found == [
        (one, peer) for one in ("prefill", "decode") for peer in ("mla", "read", "hand", "sglang")
    ]
    assert {case.check.status for case in run.cases if case.implementation in ("mla", "hand")} == {"ok"}


def test_a_peer_that_is_not_there_is_said(
    finished: tuple[subprocess.CompletedProcess[str], results.Run],
) -> None:
    done, run = finished
    absent = [case for case in run.cases if case.implementation == "sglang"]
    for case in absent:
        assert case.check.status == "not run"
        assert case.check.reason.startswith("not available here: no --vllm FOLDER was given")
        assert case.latency_ms is None
    assert "sglang is not available here" in done.stderr
    assert done.stdout.count(", sglang: not available here") == len(absent) == 2


def test_the_baseline_claims_no_check_and_no_agreement(
    finished: tuple[subprocess.CompletedProcess[str], results.Run],
) -> None:
    _, run = finished
    read = [case for case in run.cases if case.implementation == "read"]
    assert all(case.check.status == "not run" and case.latency_ms and not case.agreement for case in read)
    assert all(found.implementation != "read" for case in run.cases for found in case.agreement)


def test_ours_and_the_peers_take_turns(
    finished: tuple[subprocess.CompletedProcess[str], results.Run],
) -> None:
    _, run = finished
    ours = run.cases[0]
    assert sorted(ours.interleaved_with) == ["hand", "read"]
    assert ours.memory.page_faults is not None


class Toucher(Implementation):
    """Maps, touches and gives back as many pages in every step as it is told."""

    name = "toucher"

    def __init__(self, pages: int) -> None:
        self._size = pages * mmap.PAGESIZE

    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        """Nothing to load."""

    def restore(self, number: int = 0) -> None:
        """Nothing to restore."""

    def before(self, index: int) -> None:
        """Nothing to read."""

    def after(self, index: int) -> None:
        """Nothing to keep."""

    def outputs(self) -> dict[int, Any]:
        return {}

    def facts(self) -> Facts:
        return Facts()

    def step(self, index: int) -> None:
        if self._size:
            with mmap.mmap(-1, self._size) as memory:
                memory[:: mmap.PAGESIZE] = bytes(self._size // mmap.PAGESIZE)


@pytest.mark.parametrize(("pages", "least", "most"), [(0, 0, 20), (300, 300, 400)])
def test_page_faults_are_counted_per_forward(pages: int, least: int, most: int) -> None:
    one = Toucher(pages)
    counter = FaultCounter(one)
    one.restore()  # the warm-up
    one.before(0)
    one.step(0)
    one.after(0)
    assert counter.per_forward() is None
    for _ in range(2):
        one.restore()
        for index in range(5):
            one.before(index)
            one.step(index)
            one.after(index)
    counted = counter.per_forward()
    assert counted is not None
    assert least <= counted <= most


def test_the_runners_implementations_are_put_back() -> None:
    from mla.bench.subjects import fixture

    before = dict(fixture.IMPLEMENTATIONS)
    with catalog.Counters():
        assert "hand" in fixture.IMPLEMENTATIONS
    assert before == fixture.IMPLEMENTATIONS


def test_ours_comes_first_and_once() -> None:
    assert catalog.implementation_names(["read", "hand", "ours"]) == ["mla", "read", "hand"]
    with pytest.raises(UsageError, match=r"unknown peer 'hands'.*hand"):
        catalog.implementation_names(["hands"])


def test_long_contexts_are_named_by_their_length() -> None:
    assert scenario("long:4k").history == (4096,) * 16
    assert scenario("long:100").name == "long-100"
    assert [one.runs for one in scenarios(["decode", "long:64k"], runs=3)] == [3, 3]
    for word in ("long:", "long:0", "long:4m", "short"):
        with pytest.raises(UsageError, match="unknown scenario"):
            scenario(word)


def case(name: str, ms: float, **changes: object) -> results.Case:
    """Return a decode case of 2 tokens per forward."""
    latency = results.Latency(median=ms, ci95=None, p10=ms, p90=ms, samples=[ms])
    fields: dict[str, object] = {
        "scenario": "decode",
        "mode": "decode",
        "implementation": name,
        "query_lens": [1, 1],
        "history": [1, 1],
        "steps_per_pass": 1,
        "passes": 1,
        "warmups": 0,
        "interleaved_with": [],
        "check": results.Check(status="ok"),
        "latency_ms": latency,
        "tokens_per_s": results.Throughput(median=2000 / ms, ci95=None),
        "plan_ms": None,
        "switch_steps": [],
        "cost": results.Cost(flops=10**6, bytes=10**6),
        "roofline": results.Roofline(floor_ms=ms / 2, fraction=0.5, bound="memory"),
        "memory": results.Memory(weight_bytes=0, cache_bytes=0, peak_bytes=None),
        "ops": {},
        "clock": "host",
        "interrupted": False,
        "repro": "",
    }
    return results.Case(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_summary_says_how_ours_stands() -> None:
    cases = [case("mla", 2.0), case("read", 1.0), case("hand", 3.0), case("transformers", 40.0)]
    limits = summary.Limits(
        lambda count: Ceiling(work="read", value=2e9, source=""),
        lambda: Ceiling(work="matmul", value=1e9, source=""),
    )
    text = summary.summary(cases, limits)
    assert (
        "ours is 1.5x as fast as the best peer (hand), 20x as fast as transformers; 50 % of the memory"
        in text
    )
    ours = next(line.split() for line in text.splitlines() if line.split()[:1] == ["mla"])
    assert ours == ["mla", "2", "-", "50", "25", "50", "-", "ok"]


def test_a_slow_peer_is_compared_by_the_steps_that_both_ran() -> None:
    """Steps grow longer with the cache: a peer that ran the first ones alone must not look faster for it."""
    grown = results.Latency(median=2.5, ci95=None, p10=2.0, p90=3.0, samples=[2.0, 3.0])
    ours = case("mla", 2.5, latency_ms=grown, steps_per_pass=2)
    assert summary.speed_ratio(ours, case("transformers", 40.0)) == pytest.approx(20)


def run_of(threads: int, factor: float) -> results.Run:
    """Return a result with one point per value of every axis."""
    cases = [
        case("mla", factor * value, base=axis, point={axis: value})
        for axis, values in scaling.AXES.items()
        for value in values
    ]
    return results.Run(
        schema_version=results.SCHEMA_VERSION,
        argv=[],
        created="2000-01-01T00:00:00+00:00",
        git_commit=None,
        backend=results.BackendFacts(
            name="cpu", version=None, device="a CPU", memory_bytes=None, cache_bytes=None
        ),
        environment={"torch": "2", "torch_threads": str(threads), "cpus": "2"},
        config={"name": "tiny"},
        dtype="bfloat16",
        attention="auto",
        page_size=64,
        seed=0,
        cases=cases,
    )


def test_curves_are_drawn_from_result_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file, threads, factor in zip(files, (1, 2), (2.0, 1.1), strict=True):
        results.write(run_of(threads, factor), file)
    scaling.plot(files, tmp_path / "curves.svg")
    drawn = (tmp_path / "curves.svg").read_text()
    assert drawn.startswith("<?xml")
    assert all(f"<!-- {label} -->" in drawn for label in (*scaling.LABELS.values(), "speed-up", "2 threads"))


def test_files_without_curves_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = run_of(1, 1.0)
    run.cases.clear()
    results.write(run, tmp_path / "run.json")
    with pytest.raises(scaling.NothingToPlot, match="no points over history"):
        scaling.plot([tmp_path / "run.json"], tmp_path / "curves.svg")


def test_scaling_varies_one_axis_at_a_time() -> None:
    one = scaling.scenario("heads", 64, steps=3, passes=2)
    assert (one.heads, one.history, one.runs) == (64, (1024,) * 16, 3)
    assert scaling.scenario("batch", 4, 3, 2).query_lens == (1,) * 4


def readings(*resident: int) -> list[steady.MemoryReading]:
    """Return readings of resident sets in KiB."""
    return [steady.MemoryReading(1000 * i, size << 10, 5, 100, 0) for i, size in enumerate(resident)]


def test_memory_that_grows_to_the_end_is_no_steady_state() -> None:
    assert steady.verdict(readings(100, 5000, 9000, 9000, 9010)) == (
        True,
        "steady: from 2000 to 4000 steps the resident set changed by 10 KiB and tensors by 0 bytes",
    )
    assert not steady.verdict(readings(100, 5000, 5500, 6000, 6500))[0]


def test_a_reading_counts_every_storage_once() -> None:
    before = steady.read(0, 0)
    data = torch.zeros(1 << 20, dtype=torch.uint8)
    views = [data[:5], data[5:]]
    after = steady.read(0, 0)
    assert after.tensor_bytes - before.tensor_bytes == 1 << 20
    assert after.tensors - before.tensors == 1 + len(views)


@pytest.mark.parametrize("words", [[], ["--threads", "1"]], ids=["all", "child"])
def test_a_folder_that_is_not_there_is_refused_before_anything_is_measured(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: object, **more: object) -> None:
        raise AssertionError("it measures")

    monkeypatch.setattr(scaling, "measure", run)
    monkeypatch.setattr(scaling.subprocess, "run", run)
    with pytest.raises(ResultError, match="there is no folder"):
        scaling.scaling(["--folder", str(tmp_path / "nowhere"), *words], standalone_mode=False)
