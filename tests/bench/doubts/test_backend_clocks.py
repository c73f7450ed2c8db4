"""A backend's own clocks against the runner's, on a time that only forwards advance."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mla.bench.doubts import backend_clocks, clock
from mla.bench.doubts.backend_clocks import device_doubt, region_doubt, timer_doubt, wait_doubt
from mla.bench.doubts.clock import SecondOpinion
from mla.bench.doubts.pass_times import PassTimes
from mla_backends.api import HostTimer
from mla_backends.testing import HostBackend

THREE = [0, 1, 2]


class Forwards:
    """Take `ms` each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ms: float = 1.0) -> None:
        self.now, self._ns = 5_000, round(1e6 * ms)
        monkeypatch.setattr(backend_clocks, "now_ns", lambda: self.now)

    def before(self, index: int) -> None:
        pass

    def step(self, index: int) -> None:
        self.now += self._ns

    after = before


class Clock:
    """Reads the time of `forwards`, times `factor`, and waits `wait` ms after it has read."""

    clock = "events"

    def __init__(
        self, forwards: Forwards, factor: float = 1.0, wait: float = 0.0, launch: float = 0.0
    ) -> None:
        self._forwards, self._factor, self._wait, self._launch = forwards, factor, wait, launch
        self._start = 0.0

    def start(self) -> None:
        self._start = self._forwards.now

    def stop(self) -> float:
        taken = (self._forwards.now - self._start) / 1e6
        self._forwards.now += round(1e6 * self._wait)
        return self._factor * taken - self._launch


@pytest.mark.parametrize("factor", [0.02, 0.1, 1 / 3, 0.6, 1.7, 10.0])
def test_a_device_clock_that_runs_at_another_speed_is_doubted(
    monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    forwards = Forwards(monkeypatch)
    found = device_doubt(Clock(forwards, factor), forwards, THREE, lambda: None, lambda: None)
    assert found == (
        f"2 more forwards in a region count {2 * factor:.3g} ms on the clock 'events' and 2 ms on the host's"
    )


@pytest.mark.parametrize(
    ("factor", "wait", "launch"), [(1, 0, 0), (1, 5, 0), (1, 0, 0.9), (0.9, 1, 0.5), (1.1, 3, 0)]
)
def test_one_that_starts_later_or_stops_earlier_is_not(
    monkeypatch: pytest.MonkeyPatch, factor: float, wait: float, launch: float
) -> None:
    """The device's readings leave out launches and waits, however long; what is added tells."""
    forwards = Forwards(monkeypatch)
    assert (
        device_doubt(Clock(forwards, factor, wait, launch), forwards, THREE, lambda: None, lambda: None) == ""
    )


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_what_disturbs_the_first_pairs_is_no_agreement(
    monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """A short region that others delayed seems to be longer than a long one, on both clocks."""
    forwards = Forwards(monkeypatch)
    delays = iter([9_000_000, 0] * 4)  # of short and of long regions, before they start

    def delayed(index: int) -> None:
        forwards.now += next(delays, 0) if index == 0 else 0

    forwards.before = delayed  # type: ignore[method-assign]
    found = device_doubt(Clock(forwards, factor), forwards, THREE, lambda: None, lambda: None)
    assert found.endswith(" and 2 ms on the host's")


def test_one_forward_a_pass_or_tiny_ones_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = Forwards(monkeypatch)
    assert device_doubt(Clock(forwards, 0.1), forwards, [0], lambda: None, lambda: None) == ""
    tiny = Forwards(monkeypatch, ms=0.001)
    assert device_doubt(Clock(tiny, 0.1), tiny, THREE, lambda: None, lambda: None) == ""


class Liar(HostBackend):
    """Offers a host timer of its own."""

    def __init__(self, own: Clock) -> None:
        super().__init__()
        self._own = own

    def timer(self) -> Clock:  # type: ignore[override]
        return self._own


@pytest.mark.parametrize(("factor", "wait"), [(0.1, 0.0), (0.5, 0.0), (1.0, 4.0), (3.0, 0.0)])
def test_a_backends_own_timer_must_agree(monkeypatch: pytest.MonkeyPatch, factor: float, wait: float) -> None:
    forwards = Forwards(monkeypatch)
    found = timer_doubt(Liar(Clock(forwards, factor, wait)), forwards, 8, lambda: None)
    assert found.startswith("the backend's own timer says ")
    assert timer_doubt(Liar(Clock(forwards)), forwards, 8, lambda: None) == ""


def test_the_contracts_own_timer_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostTimer, "start", lambda self: pytest.fail("not asked for"))
    forwards = Forwards(monkeypatch)
    assert timer_doubt(HostBackend(), forwards, 8, lambda: None) == ""
    assert forwards.now == 5_000


@pytest.mark.parametrize("speed", [0.1, 0.9, 1.1, 10.0])
def test_a_clock_that_differs_from_the_systems_is_doubted(
    monkeypatch: pytest.MonkeyPatch, speed: float
) -> None:
    times = {"ours": 0, "system": 0}
    monkeypatch.setattr(clock, "now_ns", lambda: times["ours"])
    monkeypatch.setattr(clock, "system_ns", lambda which: times["system"])
    opinion = SecondOpinion()
    times |= {"ours": round(speed * 1e9), "system": 10**9}
    assert opinion.doubt() == f"the process's clock advanced by {speed:.3g} s while the system's did by 1 s"
    times |= {"ours": 10**9 + 10**6}
    assert opinion.doubt() == ""


@pytest.mark.parametrize("first", [(0, 0, 0), (0, 4_000_000, 4_000_000)])
@pytest.mark.parametrize("last", [(74_000_000, 74_000_000, 74_000_000), (70_000_000, 74_000_000, 74_100_000)])
def test_losing_the_cpu_between_two_readings_is_no_other_clock(
    monkeypatch: pytest.MonkeyPatch, first: tuple[int, int, int], last: tuple[int, int, int]
) -> None:
    ours, systems = iter([*first[::2], *last[::2]]), iter([first[1], last[1]])
    monkeypatch.setattr(clock, "now_ns", lambda: next(ours))
    monkeypatch.setattr(clock, "system_ns", lambda which: next(systems))
    assert SecondOpinion().doubt() == ""


def test_the_clock_is_bound_before_a_plugin_can_replace_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter_ns", lambda: 0)
    assert clock.now_ns() != 0


def passes(inside: float, device: float, count: int = 6) -> list[PassTimes]:
    """Return passes of one forward, in a region of `inside` ms on the host and `device` ms on the device."""
    return [PassTimes(samples=[device], inside=[inside], forwards=1) for _ in range(count)]


@pytest.mark.parametrize(("inside", "device"), [(6.3, 0.1), (1.3, 0.4), (0.9, 0.2)])
def test_work_between_starting_and_stopping_a_device_clock_is_its_own(inside: float, device: float) -> None:
    assert "the host was busy with them for" in region_doubt(passes(inside, device), passes(0.3, 0.0))


@pytest.mark.parametrize(("inside", "device"), [(1.3, 1.0), (1.8, 1.0), (0.4, 0.02), (0.3, 1.0)])
def test_launches_and_waits_around_a_device_clock_are_not(inside: float, device: float) -> None:
    assert region_doubt(passes(inside, device), passes(0.3, 0.0)) == ""


def doubted(forwards: Any, synchronize: Any, wait: Any = lambda: None, allowed: float = 0.0) -> str:
    return wait_doubt(forwards, THREE, lambda: None, synchronize, wait, allowed)[0]


@pytest.mark.parametrize(("sleep", "told"), [(0.0, False), (0.3, False), (1.0, True), (5.0, True)])
def test_a_wait_that_goes_on_after_a_forward_is_done(
    monkeypatch: pytest.MonkeyPatch, sleep: float, told: bool
) -> None:
    forwards = Forwards(monkeypatch)

    def synchronize() -> None:
        forwards.now += round(1e6 * sleep)

    found = doubted(forwards, synchronize)
    assert doubted(forwards, synchronize, allowed=sleep) == ""
    said = f"a forward takes {1 + sleep:.3g} ms until `synchronize` returns, but is done after 1 ms"
    assert found == (said if told else "")
    waited = wait_doubt(forwards, THREE, lambda: None, synchronize, lambda: None, 0.0)
    assert waited[1:] == pytest.approx((1, sleep))


class Queued(Forwards):
    """Forwards that are launched in no time, on a device that takes `ms` for each."""

    def before(self, index: int) -> None:
        self.out = torch.tensor([float("nan")])

    def step(self, index: int) -> None:
        self.done = max(self.now, getattr(self, "done", 0)) + self._ns

    def wait(self) -> None:
        self.now = max(self.now, getattr(self, "done", 0))
        self.out = torch.zeros(1)


class Polling(Clock):
    """Reads when the device is done, and looks for that every 10 ms only."""

    def stop(self) -> float:
        taken = (self._forwards.done - self._start) / 1e6  # type: ignore[attr-defined]
        while self._forwards.now < self._forwards.done:  # type: ignore[attr-defined]
            self._forwards.now += 10_000_000
        return self._factor * taken


@pytest.mark.parametrize("ms", [0.03, 0.08, 1.0])
@pytest.mark.parametrize(("factor", "seen", "told"), [(1, True, False), (0.02, True, True), (1, False, True)])
def test_a_device_clock_that_polls_is_held_against_when_outputs_are_there(
    monkeypatch: pytest.MonkeyPatch, ms: float, factor: float, seen: bool, told: bool
) -> None:
    """However short the forwards are. Where copies don't wait for outputs, they don't excuse a clock."""
    forwards = Queued(monkeypatch, ms)
    timer, wait = Polling(forwards, factor), forwards.wait if seen else lambda: None
    assert bool(device_doubt(timer, forwards, THREE, lambda: None, wait)) is told


@pytest.mark.parametrize("ms", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("poll", [0.01, 1.0, 10.0])
def test_a_wait_that_looks_now_and_then_is_not(
    monkeypatch: pytest.MonkeyPatch, ms: float, poll: float
) -> None:
    forwards = Queued(monkeypatch, ms)

    def synchronize() -> None:
        while forwards.now < forwards.done:
            forwards.now += round(1e6 * poll)

    assert doubted(forwards, synchronize, forwards.wait) == ""


@pytest.mark.parametrize("disturbed", [True, False])
def test_a_wait_during_which_others_had_the_cpu_is_not(
    monkeypatch: pytest.MonkeyPatch, disturbed: bool
) -> None:
    """No forward was left in peace: that is no evidence, whatever it takes."""
    forwards, delayed = Forwards(monkeypatch), [0]

    def synchronize() -> None:
        forwards.now += 9_000_000
        delayed[0] += 9_000_000 * disturbed

    monkeypatch.setattr(clock, "delayed_ns", lambda: delayed[0])
    assert bool(doubted(forwards, synchronize)) is not disturbed


def test_one_wait_that_is_short_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards, waits = Forwards(monkeypatch), iter([5, 5, 5, 5, 0, 5])

    def synchronize() -> None:
        forwards.now += 1_000_000 * next(waits)

    assert doubted(forwards, synchronize) == ""


@pytest.mark.parametrize(("sleep", "told", "ran"), [(0, False, 1), (900, True, 9)])
def test_long_forwards_run_once_a_turn_and_as_often_before_a_doubt(
    monkeypatch: pytest.MonkeyPatch, sleep: int, told: bool, ran: int
) -> None:
    forwards, steps = Forwards(monkeypatch, ms=1000.0), list[int]()
    monkeypatch.setattr(forwards, "before", steps.append)

    def synchronize() -> None:
        forwards.now += sleep * 1_000_000

    assert bool(doubted(forwards, synchronize)) is told
    assert len(steps) == ran
