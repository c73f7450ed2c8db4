"""The microbenchmark: the fastest way counts, every way reads all of it, and products count their FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import mla
from mla.bench.limits import microbench
from mla.bench.limits.microbench import Microbenchmark
from mla.bench.results.schema import Ceiling


@pytest.fixture
def benchmark(quick_ceilings: None) -> Microbenchmark:
    return Microbenchmark(mla.load_backend("cpu"), torch.device("cpu"), torch.bfloat16)


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
