"""Work beside the clock: which passes are doubted, on scripted times."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mla.bench.doubts.beside import empty_doubt, lasting, suspicion
from mla.bench.doubts.pass_times import PassTimes


def times(regions: float, beside: float, cpu: float | None = None, forwards: int = 10) -> PassTimes:
    """Return a pass with `beside` ms outside of its forwards, of which `cpu` ms took a processor."""
    spent = beside if cpu is None else cpu
    return PassTimes(
        forwards=forwards,
        regions=regions,
        regions_cpu=regions,
        wall=regions + beside,
        wall_cpu=regions + spent,
    )


IDLE = [times(0.0, 2.0)] * 6


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("hidden", [6.0, 20.0, 1000.0])
def test_work_that_no_forward_accounts_for_is_doubted(hidden: float, on_host: bool) -> None:
    found = suspicion([times(10.0, 2.0 + hidden)] * 6, IDLE, on_host)
    assert found.startswith(f"its clock covers {100 * 10 / (10 + hidden - 0.1):.0f}% of the time")


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("beside", [0.0, 2.0, 4.0, 7.0])
def test_what_an_idle_pass_takes_as_well_is_not(beside: float, on_host: bool) -> None:
    assert suspicion([times(10.0, beside)] * 6, IDLE, on_host) == ""


def test_a_minority_of_disturbed_passes_is_not_evidence() -> None:
    passes = [times(10.0, 500.0)] * 2 + [times(10.0, 2.0)] * 4
    assert suspicion(passes, IDLE, on_host=False) == ""


def test_on_the_host_other_processes_take_time_but_not_ours() -> None:
    """A busy machine: the wall clock runs on while this process waits for a processor."""
    passes = [times(10.0, 40.0, cpu=2.0)] * 6
    assert suspicion(passes, IDLE, on_host=True) == ""
    assert suspicion(passes, IDLE, on_host=False) != ""


def test_tiny_forwards_have_some_slack() -> None:
    idle = [times(0.0, 0.1)] * 6
    assert suspicion([times(0.05, 0.1 + 0.09)] * 6, idle, on_host=False) == ""
    assert suspicion([times(0.05, 0.1 + 0.3)] * 6, idle, on_host=False) != ""


def disturbed(count: int, quiet: int, beside: float, disturbance: float = 50.0) -> list[PassTimes]:
    """Return passes of which only some are quiet."""
    return [times(10.0, beside + (0.0 if index < quiet else disturbance)) for index in range(count)]


@pytest.mark.parametrize("quiet", [3, 4, 10])
def test_a_few_quiet_passes_take_the_doubt_away(quiet: int) -> None:
    idle = disturbed(20, 8, 2.0)
    assert suspicion(disturbed(20, quiet, 2.0), IDLE, on_host=False) != "" or quiet > 5
    assert lasting(disturbed(20, quiet, 2.0), idle, timed=10.0, on_host=False) == ""


@pytest.mark.parametrize("hidden", [60.0, 200.0])
def test_work_beside_the_clock_lasts(hidden: float) -> None:
    idle = disturbed(20, 8, 2.0)
    assert "its clock covers" in lasting(disturbed(20, 20, 2.0 + hidden), idle, timed=10.0, on_host=False)


def test_work_that_returns_into_the_clock_when_passes_repeat_was_hidden() -> None:
    found = lasting([times(80.0, 2.0)] * 6, IDLE, timed=10.0, on_host=False)
    assert found == "repeated passes take 80 ms where the timed ones took 10 ms"


def test_passes_that_others_disturbed_say_nothing() -> None:
    """They may be slower for no fault of their own, in their forwards and beside them."""
    slow = [replace(times(80.0, 500.0), disturbed=True)] * 6
    assert lasting(slow, IDLE, timed=10.0, on_host=False) == ""
    assert lasting([*slow, times(10.0, 2.0)], IDLE, timed=10.0, on_host=False) == ""
    assert lasting([*slow, times(80.0, 2.0)], IDLE, timed=10.0, on_host=False) != ""


def regions(*milliseconds: float, disturbed: bool = False) -> PassTimes:
    return PassTimes(forwards=len(milliseconds), inside=list(milliseconds), disturbed=disturbed)


def test_a_wait_for_an_idle_device_is_no_longer_than_a_forward_with_its_wait() -> None:
    forwards = [regions(1.0, 1.0, 1.0, 60.0)] * 6
    assert empty_doubt(forwards, [regions(1.4, 1.4)] * 6) == ""
    said = "waiting for an idle device takes 5 ms, longer than a forward with its wait (1 ms)"
    assert empty_doubt(forwards, [regions(5.0, 5.0, 5.0)] * 6).startswith(said), (
        "one slow forward excuses nothing"
    )


def test_an_idle_wait_that_others_disturbed_says_nothing() -> None:
    forwards, busy = [regions(1.0)] * 6, [regions(9.0, disturbed=True)] * 6
    assert empty_doubt(forwards, busy) == ""
    assert empty_doubt(forwards, [*busy, regions(0.0)]) == ""
    assert empty_doubt(forwards, [*busy, regions(9.0)]) != ""
