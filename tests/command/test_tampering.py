"""What a plugin replaces of the program that judges it is named, wherever it does so; nothing else is."""

from __future__ import annotations

import functools
import gc
import importlib
import pkgutil
import statistics
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

import mla
import mla.bench.run.scheduler
import mla_backends
from mla.bench.limits import growth
from mla.bench.measure import engine, passes, samples
from mla.bench.results import stats
from mla.command import tampering
from mla.reference import REFERENCE
from mla_backends.api import HostTimer

RUNNER = passes.PassRunner
FOE = """
import functools, time

def wrap(function):
    @functools.wraps(function)
    def wrapped(*arguments, **named):
        return function(*arguments, **named)
    return wrapped

def plain(*arguments, **named): ...

class Sub(base): ...
"""


@pytest.fixture
def foe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load a module of a plugin, once the program as it is has been noted."""
    module = types.ModuleType("foe")
    vars(module)["base"] = passes.PassRunner
    exec(FOE, vars(module))
    monkeypatch.setitem(sys.modules, "foe", module)
    return module


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tampering, "_notes", None)
    tampering.watch()


def in_place(monkeypatch: pytest.MonkeyPatch, foe: Any) -> None:
    monkeypatch.setattr(passes.PassRunner.time, "__code__", foe.plain.__code__)


REPLACED: dict[str, tuple[Callable[[pytest.MonkeyPatch, Any], None], str]] = {
    "a method, under its own name": (
        lambda patch, foe: patch.setattr(passes.PassRunner, "time", foe.wrap(passes.PassRunner.time)),
        "mla.bench.measure.passes.PassRunner.time by module foe",
    ),
    "the code of a method": (
        in_place,
        "mla.bench.measure.passes.PassRunner.time by module mla.bench.measure.passes",
    ),
    "the code of what a decorator wraps": (
        lambda patch, foe: patch.setattr(
            growth.no_garbage_collection.__wrapped__,  # type: ignore[attr-defined]
            "__code__",
            foe.plain.__code__,
        ),
        "mla.bench.limits.growth.no_garbage_collection by module contextlib",
    ),
    "a method by another one of ours": (
        lambda patch, foe: patch.setattr(passes.PassRunner, "time", passes.PassRunner.run),
        "mla.bench.measure.passes.PassRunner.time by module mla.bench.measure.passes",
    ),
    "a method that was inherited": (
        lambda patch, foe: patch.setattr(samples.Samples, "__getattribute__", foe.plain, raising=False),
        "mla.bench.measure.samples.Samples.__getattribute__ by module foe",
    ),
    "a property": (
        lambda patch, foe: patch.setattr(samples.Measurement, "check", property(foe.plain)),
        "mla.bench.measure.samples.Measurement.check by module foe",
    ),
    "a function of a module": (
        lambda patch, foe: patch.setattr(stats, "median", foe.plain),
        "mla.bench.results.stats.median by module foe",
    ),
    "a function where another module looks it up": (
        lambda patch, foe: patch.setattr(engine, "warm_up", functools.partial(foe.plain)),
        "mla.bench.measure.engine.warm_up by module foe",
    ),
    "a class": (
        lambda patch, foe: patch.setattr(passes, "PassRunner", foe.Sub),
        "mla.bench.measure.passes.PassRunner by module foe",
    ),
    "the timer of the contract": (
        lambda patch, foe: patch.setattr(HostTimer, "stop", foe.plain),
        "mla_backends.api.HostTimer.stop by module foe",
    ),
    "a reference op": (
        lambda patch, foe: patch.setitem(REFERENCE, "linear", foe.Sub),
        "mla.reference.REFERENCE['linear'] by module ",
    ),
    "a method of one reference op": (
        lambda patch, foe: patch.setattr(REFERENCE["linear"], "prepare", foe.plain, raising=False),
        "mla.reference.REFERENCE['linear'] by module foe",
    ),
    "the clock": (
        lambda patch, foe: patch.setattr(time, "perf_counter_ns", foe.wrap(time.perf_counter_ns)),
        "time.perf_counter_ns by module foe",
    ),
    "the clock, by another one": (
        lambda patch, foe: patch.setattr(time, "perf_counter_ns", time.process_time_ns),
        "time.perf_counter_ns by module time",
    ),
    "what tells a pass from the rest": (
        lambda patch, foe: patch.setattr(gc, "disable", foe.plain),
        "gc.disable by module foe",
    ),
    "the statistics": (
        lambda patch, foe: patch.setattr(statistics, "median", foe.plain),
        "statistics.median by module foe",
    ),
}


@pytest.mark.parametrize("what", REPLACED)
def test_what_is_replaced_is_named(what: str, foe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, named = REPLACED[what]
    assert tampering.found() == []
    replace(monkeypatch, foe)
    found = tampering.found()
    monkeypatch.undo()  # before pytest uses what was replaced
    assert [one for one in found if one.startswith(named)] != [], found


def test_a_subclass_and_what_it_overrides_are_a_plugins_good_right(foe: Any) -> None:
    """So are attributes of its own objects."""
    timer = HostTimer(lambda: None)
    timer.stop = foe.plain  # type: ignore[method-assign]
    foe.Sub.time = foe.plain
    assert tampering.found() == []


def test_a_module_that_is_loaded_later_is_held_to_its_own_code(
    foe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to compare it with: what counts is where its functions come from."""
    assert tampering._notes is not None
    for place in [place for place in tampering._notes.places if place.startswith("mla.bench.measure.passes")]:
        del tampering._notes.places[place]
    assert tampering.found() == []
    monkeypatch.setattr(passes.PassRunner, "time", foe.wrap(passes.PassRunner.time))
    assert tampering.found() == ["mla.bench.measure.passes.PassRunner.time by module foe"]


def test_nothing_of_our_own_is_a_false_alarm_however_late_it_is_loaded() -> None:
    for package in (mla, mla_backends):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    assert tampering.found() == []
    assert tampering._notes is not None
    tampering._notes.places.clear()
    tampering._notes.packages &= set(sys.stdlib_module_names)
    assert tampering.found() == []


def test_what_is_replaced_in_torch_is_a_remark_alone(foe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vendors' stacks do so to bring their device."""
    assert tampering.in_torch() == []
    monkeypatch.setattr(torch.Tensor, "cpu", foe.plain, raising=False)
    monkeypatch.setattr(torch, "equal", foe.plain)
    assert tampering.in_torch() == ["torch.equal by module foe", "torch.Tensor.cpu by module foe"]
    assert tampering.found() == []


def test_before_anything_was_noted_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tampering, "_notes", None)
    assert tampering.found() == []
