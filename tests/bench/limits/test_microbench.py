"""The microbenchmark: every route counts, the fastest wins, and an op whose product is wrong never does."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

import mla
from mla.bench.limits import microbench
from mla.bench.limits.microbench import Microbenchmark, Way, grown, no_garbage_collection, per_call
from mla.bench.results.schema import Ceiling
from mla.bench.run.ceilings import footprints
from mla.command import console
from mla.reference import REFERENCE
from mla_backends.testing import HostBackend

CPU = torch.device("cpu")


@pytest.fixture
def benchmark(quick_ceilings: None) -> Microbenchmark:
    return Microbenchmark(mla.load_backend("cpu"), CPU, torch.bfloat16)


class Linear(type(REFERENCE["linear"])):  # type: ignore[misc]
    """An op of a backend, counted: right, unless it is told what to do with a call that would be."""

    def __init__(self, wrong: Callable[[Any, torch.Tensor, torch.Tensor], object] | None = None) -> None:
        super().__init__()
        self.calls, self._wrong = 0, wrong

    def __call__(self, packed: Any, *, x: torch.Tensor, bias: Any, out: torch.Tensor) -> None:
        self.calls += 1
        right = partial(super().__call__, packed, bias=None)
        if self._wrong is None:
            right(x=x, out=out)
        else:
            self._wrong(right, x, out)


def half_the_rows(right: Any, x: torch.Tensor, out: torch.Tensor) -> None:
    half = -(-len(x) // 2)
    right(x=x[:half], out=out[:half])
    out[half:] = 0.5


WRONG: dict[str, Callable[[Any, torch.Tensor, torch.Tensor], object]] = {
    "at once": lambda right, x, out: None,
    "ones": lambda right, x, out: out.fill_(1.0),
    "half the rows": half_the_rows,
    "slightly off": lambda right, x, out: (right(x=x, out=out), out.mul_(1.1)),
}


def with_op(op: Any, dtype: torch.dtype = torch.float32) -> Microbenchmark:
    return Microbenchmark(HostBackend(ops={"mine": op}), CPU, dtype)


def counted(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Way], float]) -> list[str]:
    """Replace the clock of every way by `seconds`; return the names of the ways that are timed."""
    timed: list[str] = []

    def script(self: Microbenchmark, way: Way, enough: float) -> float:
        timed.append(way.name)
        return seconds(way)

    monkeypatch.setattr(Microbenchmark, "_seconds", script)
    return timed


def scripted(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    ways = [Way(name, lambda: torch.ones(1)) for name in seconds]
    monkeypatch.setattr(microbench, "read_ways", lambda weight: ways)
    monkeypatch.setattr(Microbenchmark, "_choice", lambda *where: None)
    counted(monkeypatch, lambda way: seconds[way.name])


def test_the_fastest_way_is_the_ceiling_and_is_named(
    benchmark: Microbenchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, slow=4.0, fast=0.5, middling=2.0)
    assert benchmark.read(3 << 20) == Ceiling(
        work="read", value=(3 << 20) / 0.5, source="measured: fast, 3 MiB", footprint_bytes=3 << 20
    )


def test_a_way_that_a_device_lacks_is_no_obstacle_and_all_of_them_are(
    benchmark: Microbenchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking() -> torch.Tensor:
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(Microbenchmark, "_choice", lambda *where: None)
    some = [Way("a", lacking), Way("b", lambda: torch.ones(1))]
    monkeypatch.setattr(microbench, "read_ways", lambda weight: some)
    assert benchmark.read(1 << 20).source == "measured: b, 1 MiB"
    monkeypatch.setattr(microbench, "read_ways", lambda weight: some[:1])
    with pytest.raises(NotImplementedError):
        benchmark.read(1 << 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("place", [0, -1])
def test_every_way_of_reading_reads_all_of_it(dtype: torch.dtype, place: int) -> None:
    """The largest number shows in the result of each way, wherever it is."""
    weight = torch.ones(32, microbench.FEATURES, dtype=dtype)
    ways = microbench.read_ways(weight)
    weight.view(-1)[place] = 1e12
    if dtype == torch.bfloat16:  # read in pairs as float32, whose leading half is the second
        weight.view(-1)[place : place + 2 or None] = 1e12
    assert len(ways) == 5
    for way in ways:
        assert way.call().max() > 1e11, way.name


def test_every_route_to_a_product_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    routes = {
        torch.bfloat16: ["torch.mm", "torch.mm in float32", "mine"],
        torch.float32: ["torch.mm", "mine"],
    }
    for dtype, names in routes.items():
        timed = counted(monkeypatch, lambda way: 1.0)
        with_op(Linear(), dtype).product(4, 64, 32)
        assert timed == names


def test_widened_operands_give_the_same_product() -> None:
    x, weight = (microbench.random_rows(rows, 48, torch.bfloat16, CPU) for rows in (8, 24))
    plain, wide = (way.call() for way in microbench.product_ways(x, weight))
    assert wide.dtype == torch.float32
    assert torch.allclose(wide, x.double().mm(weight.double().t()).float(), rtol=1e-4, atol=1e-4)
    assert torch.allclose(plain.float(), wide, rtol=2e-2, atol=2e-2)


def test_a_product_counts_two_flops_per_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    counted(monkeypatch, lambda way: 0.5 if way.name == "torch.mm" else 0.7)
    assert with_op(Linear(), torch.bfloat16).product(2, 2048, 64) == Ceiling(
        work="matmul",
        value=2 * 2 * 2048 * 64 / 0.5,
        source="measured: torch.mm, 2 x 2048 x 64 bfloat16",
        dtype="bfloat16",
        footprint_bytes=2 * (2 * 2048 + 2048 * 64 + 2 * 64),
    )


@pytest.mark.parametrize(("mine", "ours"), [(0.5, True), (2.0, False)])
def test_a_limit_that_only_our_own_op_reaches_says_so(
    monkeypatch: pytest.MonkeyPatch, mine: float, ours: bool
) -> None:
    counted(monkeypatch, lambda way: mine if way.ours else 1.0)
    assert with_op(Linear()).product(2, 64, 64).ours is ours
    assert with_op(Linear()).read(1 << 18).ours is ours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 2048, 16), (3, 64, 40), (32, 128, 128)])
def test_an_op_that_is_right_counts(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    tokens, inputs, outputs = shape
    weight = microbench.random_rows(outputs, inputs, dtype, CPU)
    benchmark = with_op(Linear(), dtype)
    choice = benchmark._choice(weight)
    assert choice is not None
    way = microbench.own_product(choice, weight, tokens)
    for calls in (1, 2, 7, 14):
        assert benchmark._region(way, calls) > 0


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("tokens", [1, 32])
def test_an_op_whose_product_is_wrong_never_counts(
    fault: str,
    tokens: int,
    quick_ceilings: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault = "ones" if tokens == 1 and fault == "half the rows" else fault
    monkeypatch.setattr(microbench, "REPEATS", 12)
    monkeypatch.setattr(microbench, "MAX_REPEAT_S", 60.0)
    monkeypatch.setattr(console, "_noted", set())
    native = Linear(WRONG[fault])
    ceiling = with_op(native).product(tokens, 256, 128) if tokens > 1 else with_op(native).read(1 << 19)
    assert native.calls > 0, "it was not even tried"
    assert not ceiling.ours
    assert "mine" not in ceiling.source
    assert capsys.readouterr().err.startswith("mine is left out of the limits: its result is wrong for ")


def test_an_op_that_returns_at_once_does_not_make_the_squares_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong from 1024 rows on; and even one whose time counts would not."""
    monkeypatch.setattr(microbench, "SIDES", (2, 4, 8, 16))
    times = {2: microbench.LONG_PRODUCT_S / 2, 4: 2 * microbench.LONG_PRODUCT_S, 8: 1.0}
    sides: Iterator[int] = iter(times)
    side = [0]

    def seconds(way: Way) -> float:
        if way.name == "torch.mm":
            side[0] = next(sides)
        return 1e-9 if way.ours else times[side[0]]

    counted(monkeypatch, seconds)
    ceilings = list(with_op(Linear()).squares())
    assert [ceiling.ours for ceiling in ceilings] == [True, True]


@pytest.mark.parametrize(("least", "tried"), [(1.0, False), (100.0, True)])
def test_a_way_that_is_hopeless_in_a_product_of_some_time_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, least: float, tried: bool
) -> None:
    """In a short one, another load may have been in its way."""
    monkeypatch.setattr(microbench, "HOPELESS_S", least)
    times = {"torch.mm": 1.0, "torch.mm in float32": 9.0}
    timed = counted(monkeypatch, lambda way: times[way.name])
    benchmark = Microbenchmark(HostBackend(), CPU, torch.bfloat16)
    for side in (16, 32):
        benchmark.product(side, side, side)
    assert timed == ["torch.mm", "torch.mm in float32", "torch.mm", *["torch.mm in float32"] * tried]


class Deaf(HostBackend):
    """A backend that would lower every ceiling if it were asked to wait."""

    def synchronize(self) -> None:
        raise AssertionError("a ceiling must not depend on the backend's synchronize")


def test_the_backend_is_not_asked_to_wait(quick_ceilings: None) -> None:
    benchmark = Microbenchmark(Deaf(ops={"mine": Linear()}), CPU, torch.float32)
    for ceiling in (benchmark.read(1 << 18), benchmark.copy(1 << 18), benchmark.product(4, 64, 32)):
        assert ceiling.value > 0


def test_a_region_ends_when_its_last_result_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[torch.Size, Any]] = []
    to = torch.Tensor.to
    with monkeypatch.context() as patched:
        patched.setattr(
            torch.Tensor, "to", lambda self, where: read.append((self.shape, where)) or to(self, where)
        )
        for written in (torch.ones(3, 4), torch.tensor(1.0)):
            microbench.wait(written)
    assert read == [(torch.Size([]), "cpu")] * 2


class Ticking:
    """A clock that only work advances, and a device whose every wait costs the same."""

    def __init__(self, each: float, wait: float) -> None:
        self.each, self.waited, self.now = each, wait, 0.0

    def now_ns(self) -> int:
        return round(1e9 * self.now)

    def call(self) -> torch.Tensor:
        self.now += self.each
        return torch.ones(1)

    def wait(self, written: torch.Tensor) -> None:
        self.now += self.waited


@pytest.mark.parametrize("wait", [0.0, 1e-4, 3e-3, 8e-3])
def test_a_wait_that_always_costs_the_same_lowers_no_ceiling(
    wait: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticking = Ticking(each=1e-4, wait=wait)
    monkeypatch.setattr(microbench, "now_ns", ticking.now_ns)
    monkeypatch.setattr(microbench, "wait", ticking.wait)
    monkeypatch.setattr(microbench, "read_ways", lambda weight: [Way("x", ticking.call)])
    monkeypatch.setattr(Microbenchmark, "_choice", lambda *where: None)
    ceiling = Microbenchmark(HostBackend(), CPU, torch.float32).read(1 << 20)
    assert ceiling.value == pytest.approx((1 << 20) / 1e-4, rel=0.01)


# -------------------------------------------------------------------------------- seconds per call


@pytest.mark.parametrize("constant", [0.0, 1e-4, 3e-3, 9e-3])
@pytest.mark.parametrize("each", [1e-5, 3e-4, 5e-2])
def test_what_a_region_costs_whatever_it_holds_drops_out(constant: float, each: float) -> None:
    assert per_call(lambda calls: constant + calls * each) == pytest.approx(each, rel=1e-6)


def test_one_quiet_repetition_of_each_region_is_enough() -> None:
    noise = itertools.cycle([0.7, 0.0, 0.3, 0.0, 0.9])
    assert per_call(lambda calls: calls * 1e-3 + next(noise) * 1e-3) == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize(
    ("short", "long", "least", "most"),
    [
        (1.0, 2.0, 1.0, 1.0),
        (2.0, 3.0, 1.0, 1.0),  # a constant cost as large as the work
        (1.9, 2.0, 1.0, 1.0),  # the shorter ones alone were disturbed
        (5.0, 2.0, 0.5, 1.0),  # nothing but noise: not negative
        (2.0, 2.0, 0.5, 1.0),
        (1.0, 9.0, 1.0, 1.0),  # noise in the longer one: the shorter one alone is a bound
    ],
)
def test_noise_makes_no_result_absurd(short: float, long: float, least: float, most: float) -> None:
    assert least <= grown(short, long, 1) <= most
    assert grown(7 * short, 7 * long, 7) == pytest.approx(grown(short, long, 1))


def test_a_call_of_seconds_is_made_twice() -> None:
    asked: list[int] = []

    def region(calls: int) -> float:
        asked.append(calls)
        return 9.0 / len(asked)

    assert per_call(region) == 4.5
    assert asked == [1, 1]


def test_a_way_that_cannot_win_is_not_repeated() -> None:
    def regions(enough: float) -> int:
        asked: list[int] = []
        per_call(lambda calls: asked.append(calls) or 1e-3 * calls, enough)  # type: ignore[func-returns-value]
        return len(asked)

    assert regions(1e-6) < regions(2.0)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_off_as_it_is_while_forwards_are_timed(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with no_garbage_collection():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


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
