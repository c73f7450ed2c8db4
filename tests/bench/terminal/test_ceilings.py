"""Ceilings in print: a table, Markdown, and a line per kind of work under a run."""

from __future__ import annotations

from typing import Any

from mla.bench.results.schema import Ceiling, CeilingRun
from mla.bench.terminal.ceilings import rate, render, run_lines
from mla.text import size


def test_a_table_shows_each_ceiling_and_the_sources_of_what_is_declared(ceiling_run: CeilingRun) -> None:
    assert render(ceiling_run, "table").splitlines() == [
        "x on X1, 3 threads, last-level cache 4 MiB",
        "",
        "work    size           reached  % of declared  fastest way",
        "read    4 MiB         400 GB/s              -  sum",
        "read    16 MiB        150 GB/s             75  dot",
        "copy    16 MiB        100 GB/s             50  neg",
        "matmul  1 x 2 x 3  500 GFLOP/s             25  torch.mm",
        "matmul  1 x 2 x 3  500 GFLOP/s              -  torch.mm",
        "",
        "declared read bandwidth: 200 GB/s (https://x.example/sheet)",
        "declared bfloat16 matmul rate: 2 TFLOP/s (https://x.example/flops)",
    ]
    assert "| read | 16 MiB | 150 GB/s | 75 | dot |" in render(ceiling_run, "md").splitlines()


def test_a_runs_limits_are_a_line_per_kind_of_work(ceiling_run: CeilingRun) -> None:
    assert run_lines([]) == []
    assert run_lines(ceiling_run.measured) == [
        "read bandwidth: 150 to 400 GB/s at 4 MiB to 16 MiB",
        "copy bandwidth: 100 GB/s (measured: neg, 16 MiB)",
        "bfloat16 matmul rate: 500 GFLOP/s (measured: torch.mm, 1 x 2 x 3)",
        "float32 matmul rate: 500 GFLOP/s (measured: torch.mm, 1 x 2 x 3)",
    ]


def test_a_line_says_how_far_a_limit_varied_and_that_only_our_own_op_reaches_it() -> None:
    def product(**changes: Any) -> Ceiling:
        fields = {"value": 5e11, "source": "measured: mine, 1 x 2 x 3", "dtype": "bfloat16", **changes}
        return Ceiling(work="matmul", **fields)

    start = "bfloat16 matmul rate: 500 GFLOP/s (measured: mine, 1 x 2 x 3)"
    ours = "; caveat: only the kernel under test is as fast"
    assert run_lines([product(lowest=4.5e11)]) == [f"{start}, up to 10 % lower when repeated"]
    assert run_lines([product(lowest=5e11)]) == [start]
    assert run_lines([product(lowest=5e11, ours=True)]) == [start + ours]
    assert run_lines([product(lowest=1e11, ours=True)]) == [f"{start}, up to 80 % lower when repeated{ours}"]


def test_a_line_of_several_footprints_says_the_same() -> None:
    def read(value: float, lowest: float, size: int, ours: bool) -> Ceiling:
        return Ceiling(work="read", value=value, source="x", footprint_bytes=size, lowest=lowest, ours=ours)

    start = "read bandwidth: 100 to 200 GB/s at 1 MiB to 4 MiB"
    ours = "; caveat: only the kernel under test is as fast"
    some = [read(1e11, 0.9e11, 4 << 20, True), read(2e11, 1e11, 1 << 20, False)]
    assert run_lines(some) == [f"{start}, up to 50 % lower when repeated{ours} at some sizes"]
    both = [read(1e11, 1e11, 4 << 20, True), read(2e11, 2e11, 1 << 20, True)]
    assert run_lines(both) == [start + ours]


def test_one_thread_is_one_and_what_only_our_own_op_reaches_is_marked(ceiling_run: CeilingRun) -> None:
    ceiling_run.environment, ceiling_run.measured[-1].ours = {"torch_threads": "1"}, True
    text = render(ceiling_run, "md")
    assert text.splitlines()[0] == "x on X1, 1 thread, last-level cache 4 MiB"
    assert text.count("| torch.mm (our own) |") == 1


def test_units_keep_three_digits() -> None:
    assert rate(Ceiling(work="read", value=3.35e12, source="")) == "3.35 TB/s"
    assert rate(Ceiling(work="read", value=9.87e7, source="")) == "98.7 MB/s"
    assert [size(count) for count in (None, 1 << 18, 3 << 20, 1 << 30)] == ["-", "256 KiB", "3 MiB", "1 GiB"]
