"""`ceilings`: what is measured, what is declared, how both are printed and stored, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import mla
from mla.bench import results
from mla.bench.limits import microbench
from mla.bench.limits.microbench import Microbenchmark
from mla.bench.results import ceilings_file
from mla.bench.results.ceilings_file import CeilingRun
from mla.bench.results.schema import Ceiling
from mla.bench.run import ceilings as ceilings_command
from mla.bench.run.ceilings import footprints
from mla.bench.terminal.ceilings import rate, render, run_lines
from mla.errors import ResultError
from mla.text import size

Bench = Callable[..., Any]
CPU = ("ceilings", "--backend", "cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure little, and once."""
    monkeypatch.setattr(microbench, "SIDES", (16, 32))
    monkeypatch.setattr(microbench, "SECONDS", 0.0)
    monkeypatch.setattr(microbench, "REPEATS", 1)
    monkeypatch.setattr(ceilings_command, "LARGEST", 1 << 20)
    monkeypatch.setattr(ceilings_command, "TOKENS", (2, 3))


@pytest.fixture
def benchmark(quick: None) -> Microbenchmark:
    return Microbenchmark(mla.load_backend("cpu"), torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize(
    ("cache", "free", "powers"),
    [
        (32 << 20, None, [18, 20, 22, 24, 26, 27]),  # 4 caches are 128 MiB
        (1 << 20, None, [18, 20, 22]),
        (None, None, [18, 20, 22, 24, 26, 28, 30]),
        (32 << 20, 40 << 20, [18, 20, 22, 23]),  # a quarter of memory is 10 MiB
        (60 << 20, 1 << 40, [18, 20, 22, 24, 26, 27]),
        (260 << 20, 1 << 40, [18, 20, 22, 24, 26, 28, 30]),
        (1, 1, [18]),
    ],
)
def test_footprints_reach_from_the_smallest_beyond_the_cache(
    cache: int | None, free: int | None, powers: list[int]
) -> None:
    assert footprints(cache, free) == [1 << power for power in powers]


def test_the_fastest_way_is_the_ceiling_and_is_named(
    benchmark: Microbenchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"slow": 4.0, "fast": 0.5, "middling": 2.0}
    monkeypatch.setattr(Microbenchmark, "_shortest", lambda self, work: work())
    ways = {name: (lambda value=value: value) for name, value in seconds.items()}
    monkeypatch.setattr(Microbenchmark, "_read_ways", lambda self, weight: ways)
    found = benchmark.read(3 << 20)
    assert found == Ceiling(
        work="read", value=(3 << 20) / 0.5, source="measured: fast, 3 MiB", footprint_bytes=3 << 20
    )


def test_a_way_that_a_device_lacks_is_no_obstacle_and_all_of_them_are(
    benchmark: Microbenchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking() -> float:
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(Microbenchmark, "_shortest", lambda self, work: work())
    monkeypatch.setattr(Microbenchmark, "_read_ways", lambda self, weight: {"a": lacking, "b": lambda: 1.0})
    assert benchmark.read(1 << 20).source == "measured: b, 1 MiB"
    monkeypatch.setattr(Microbenchmark, "_read_ways", lambda self, weight: {"a": lacking})
    with pytest.raises(NotImplementedError):
        benchmark.read(1 << 20)


def test_one_call_is_what_a_region_of_many_is_divided_into(
    benchmark: Microbenchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    regions: list[int] = []

    def region(self: Microbenchmark, work: Callable[[], object], calls: int) -> float:
        regions.append(calls)
        return calls * microbench.REGION / 8

    monkeypatch.setattr(Microbenchmark, "_region", region)
    assert benchmark._shortest(lambda: None) == microbench.REGION / 8
    assert regions == [1, 1, 8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("place", [0, -1])
def test_every_way_of_reading_reads_all_of_it(dtype: torch.dtype, place: int) -> None:
    """The largest number shows in the result of each way, wherever it is."""
    benchmark = Microbenchmark(mla.load_backend("cpu"), torch.device("cpu"), dtype, "reference")
    weight = torch.ones(32, microbench.FEATURES, dtype=dtype)
    ways = benchmark._read_ways(weight)
    weight.view(-1)[place] = 1e12
    if dtype == torch.bfloat16:  # read in pairs as float32, whose leading half is the second
        weight.view(-1)[place : place + 2 or None] = 1e12
    assert len(ways) == 5
    for name, work in ways.items():
        assert work().max() > 1e11, name


def test_a_product_counts_two_flops_per_multiply_add(
    benchmark: Microbenchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Microbenchmark, "_best", lambda self, ways: (0.5, "torch.mm"))
    assert benchmark.product(2, 2048, 64) == Ceiling(
        work="matmul",
        value=2 * 2 * 2048 * 64 / 0.5,
        source="measured: torch.mm, 2 x 2048 x 64 bfloat16",
        dtype="bfloat16",
        footprint_bytes=2 * (2 * 2048 + 2048 * 64 + 2 * 64),
    )


def test_larger_squares_are_left_out_once_one_takes_long(
    benchmark: Microbenchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(microbench, "SIDES", (2, 4, 8))
    times = {2: microbench.LONG / 2, 4: 2 * microbench.LONG, 8: 1.0}
    sides: Iterator[int] = iter(times)
    monkeypatch.setattr(Microbenchmark, "_best", lambda self, ways: (times[next(sides)], "torch.mm"))
    assert len(list(benchmark.squares())) == 2


def test_the_command_measures_stores_and_shows_the_same(bench: Bench, quick: None) -> None:
    done = bench(*CPU, "--dtype", "fp32", "-o", "c.json")
    assert done.code == 0
    assert done.err == ""
    run = ceilings_file.read(Path("c.json"))
    assert [one.work for one in run.measured[:4]] == ["read", "read", "copy", "copy"]
    assert {one.footprint_bytes for one in run.measured[:4]} == {1 << 18, 1 << 20}
    products = [one.source.rpartition(", ")[2] for one in run.measured[4:]]
    assert products[:2] == ["16 x 16 x 16 float32", "32 x 32 x 32 float32"]
    assert products[2:4] == ["2 x 2048 x 3648 float32", "3 x 2048 x 3648 float32"]
    assert len(products) == 2 + 3 * 2
    assert all(one.value > 0 for one in run.measured)
    assert run.environment["torch_threads"] == str(torch.get_num_threads())
    assert not run.interrupted
    assert bench("show", "c.json").out == done.out
    assert "The backend declares no peaks for this device." in done.out


def test_json_on_stdout_is_the_file(bench: Bench, quick: None) -> None:
    done = bench(*CPU, "--dtype", "fp32", "-o", "c.json", "--format", "json")
    assert done.out == Path("c.json").read_text()


def test_the_default_is_what_the_device_computes_natively(bench: Bench, quick: None) -> None:
    run = bench("ceilings", "--backend", "fake-float32-only", "--format", "json", fakes=["float32_only"])
    dtypes = {one.dtype for one in ceilings_file.decode(run.out.encode()).measured}
    assert dtypes == {None, "float32"}


def test_what_a_device_refuses_is_named_and_left_out(
    bench: Bench, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Microbenchmark, size: int) -> Ceiling:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(Microbenchmark, "copy", refuse)
    done = bench(*CPU, "--dtype", "fp32", "--format", "json")
    assert done.code == 0
    assert done.err.splitlines() == [
        "skipped: copy of 256 KiB: RuntimeError: out of memory",
        "skipped: copy of 1 MiB: RuntimeError: out of memory",
    ]
    assert "copy" not in {one.work for one in ceilings_file.decode(done.out.encode()).measured}


def test_an_interrupt_keeps_what_was_measured(
    bench: Bench, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Microbenchmark, size: int) -> Ceiling:
        raise KeyboardInterrupt

    monkeypatch.setattr(Microbenchmark, "copy", interrupt)
    done = bench(*CPU, "-o", "c.json")
    assert done.code == 130
    assert done.error == "interrupted: the result holds what was measured until then"
    run = ceilings_file.read(Path("c.json"))
    assert [one.work for one in run.measured] == ["read", "read"]
    assert run.interrupted


def test_nothing_measured_is_exit_code_5(bench: Bench, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Microbenchmark, "_best", lambda self, ways: 1 / 0)
    assert bench(*CPU).code == 5


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            ["--dtype", "bf61"],
            2,
            "error: unknown dtype 'bf61'. Did you mean 'bf16'? --dtype takes bf16, fp16, ",
        ),
        (["--dtype", ""], 2, "error: unknown dtype ''. --dtype takes bf16, fp16, fp32, comma-separated."),
        (["--dtype", "bf16,,fp32"], 2, "error: unknown dtype ''. --dtype takes "),
        (["-O", "x"], 2, "error: -O takes KEY=VALUE, got 'x'."),
        (["-O", "x=1"], 2, "error: backend 'cpu' has no option 'x'; it knows: threads"),
        (["--device", "7"], 3, "error: backend 'cpu' has one device, so there is no device 7."),
        (["--device", "-1"], 2, "Error: Invalid value for '--device': -1 is not in the range"),
        (["-o", "no/c.json"], 2, "error: cannot write 'no/c.json': there is no folder 'no'."),
        (["--format", "csv"], 2, "Error: Invalid value for '--format': 'csv' is not one of"),
        (["more"], 2, "Error: Got unexpected extra argument (more)"),
    ],
)
def test_a_mistake_gets_its_sentence(bench: Bench, words: list[str], code: int, message: str) -> None:
    done = bench(*CPU, *words)
    assert done.code == code
    assert done.out == ""
    assert done.error.startswith(message)


def test_a_dtype_the_device_emulates_is_refused(bench: Bench) -> None:
    words = ("ceilings", "--backend", "fake-float32-only", "--dtype", "bf16")
    done = bench(*words, fakes=["float32_only"])
    assert done.code == 2
    assert done.error.startswith("error: backend 'fake-float32-only' does not compute bfloat16 natively; ")


@pytest.fixture
def report() -> CeilingRun:
    """Return ceilings of a device with a cache of 4 MiB and declared peaks."""
    facts = results.BackendFacts(name="x", version=None, device="X1", memory_bytes=None, cache_bytes=4 << 20)
    return CeilingRun(
        report="ceilings",
        schema_version=1,
        argv=[],
        created="2000-01-01T00:00:00+00:00",
        git_commit=None,
        backend=facts,
        environment={"torch_threads": "3"},
        measured=[
            Ceiling(work="read", value=4e11, source="measured: sum, 4 MiB", footprint_bytes=4 << 20),
            Ceiling(work="read", value=1.5e11, source="measured: dot, 16 MiB", footprint_bytes=16 << 20),
            Ceiling(work="copy", value=1e11, source="measured: neg, 16 MiB", footprint_bytes=16 << 20),
            Ceiling(work="matmul", value=5e11, source="measured: torch.mm, 1 x 2 x 3", dtype="bfloat16"),
            Ceiling(work="matmul", value=5e11, source="measured: torch.mm, 1 x 2 x 3", dtype="float32"),
        ],
        declared=[
            Ceiling(work="read", value=2e11, source="https://x.example/sheet"),
            Ceiling(work="matmul", value=2e12, source="https://x.example/flops", dtype="bfloat16"),
        ],
    )


def test_the_share_of_the_declared_peak_is_of_the_same_work_beyond_the_cache(report: CeilingRun) -> None:
    assert [report.fraction(one) for one in report.measured] == [None, 0.75, 0.5, 0.25, None]


def test_a_table_shows_each_ceiling_and_the_sources_of_what_is_declared(report: CeilingRun) -> None:
    assert render(report, "table").splitlines() == [
        "x on X1, 3 threads, last-level cache 4 MiB",
        "",
        "work    size           reached  % of declared  fastest way",
        "read    4 MiB         400 GB/s              -  sum",
        "read    16 MiB        150 GB/s             75  dot",
        "copy    16 MiB        100 GB/s             50  neg",
        "matmul  1 x 2 x 3  500 GFLOP/s             25  torch.mm",
        "matmul  1 x 2 x 3  500 GFLOP/s              -  torch.mm",
        "",
        "declared reading: 200 GB/s (https://x.example/sheet)",
        "declared bfloat16 products: 2 TFLOP/s (https://x.example/flops)",
    ]
    assert "| read | 16 MiB | 150 GB/s | 75 | dot |" in render(report, "md").splitlines()


def test_ceilings_survive_the_round_trip_and_faults_are_named(report: CeilingRun, tmp_path: Path) -> None:
    data = results.encode(report)
    assert ceilings_file.decode(data) == report
    document = msgspec.json.decode(data)
    for change, expected in (
        ({"measured": [{}]}, "Object missing required field `work` - at `$.measured[0]`"),
        ({"backend": 1}, "Expected `object`, got `int` - at `$.backend`"),
    ):
        (tmp_path / "bad.json").write_bytes(msgspec.json.encode({**document, **change}))
        with pytest.raises(ResultError) as refused:
            ceilings_file.read(tmp_path / "bad.json")
        assert str(refused.value) == f"'{tmp_path / 'bad.json'}' is not a ceilings file: {expected}."
    with pytest.raises(ResultError, match="schema version 9, but this mla reads only up to 1"):
        ceilings_file.decode(msgspec.json.encode({**document, "schema_version": 9}))


def test_show_refuses_a_format_that_ceilings_do_not_have(bench: Bench, report: CeilingRun) -> None:
    Path("c.json").write_bytes(results.encode(report))
    done = bench("show", "c.json", "--format", "csv")
    assert (done.code, done.error) == (
        2,
        "error: ceilings cannot be printed as csv: use table, md or json.",
    )


def test_a_runs_limits_are_a_line_per_kind_of_work(report: CeilingRun) -> None:
    assert run_lines([]) == []
    assert run_lines(report.measured) == [
        "limit of reading: 150 GB/s to 400 GB/s, at 2 footprints from 4 MiB to 16 MiB",
        "limit of copying: 100 GB/s (measured: neg, 16 MiB)",
        "limit of bfloat16 products: 500 GFLOP/s (measured: torch.mm, 1 x 2 x 3)",
        "limit of float32 products: 500 GFLOP/s (measured: torch.mm, 1 x 2 x 3)",
    ]


def test_units_keep_three_digits() -> None:
    assert rate(Ceiling(work="read", value=3.35e12, source="")) == "3.35 TB/s"
    assert rate(Ceiling(work="read", value=9.87e7, source="")) == "0.0987 GB/s"
    assert [size(count) for count in (None, 1 << 18, 3 << 20, 1 << 30)] == ["-", "256 KiB", "3 MiB", "1 GiB"]
