"""The runner's clock replaced by the scripts of the fake backend `virtual_clock`, for exact statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from mla.bench.measure import engine, evidence, passes
from mla.bench.measure.engine import _Engine
from mla.bench.measure.passes import PassRunner
from mla.bench.run import profile


def script_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a backend that has `scripted()` time forwards, warm-ups and stages; any other is timed as ever.

    Scripted times contradict all other evidence, which is not asked for then.
    """
    make_runner = _Engine.runner
    warm_up = passes.warm_up

    def runner(self: _Engine, *arguments: Any) -> PassRunner:
        made = make_runner(self, *arguments)
        scripted = getattr(self.backend, "scripted", None)
        if scripted is not None:
            made.timer = made.timer or scripted()
            made.scripted = scripted  # type: ignore[attr-defined]
        return made

    def warmed(
        forwards: Any,
        steps: int,
        least: int,
        time_step: Callable[[int], float],
        numbers: Iterator[int],
        tick: Any,
        must: int,
    ) -> Any:
        scripted = getattr(time_step.__self__, "scripted", None)  # type: ignore[attr-defined]
        timer = scripted() if scripted and least else None

        def step(index: int) -> float:
            forwards.step(index)
            return float(timer.stop())

        return warm_up(forwards, steps, least, step if timer else time_step, numbers, tick, must)

    def stage_timer(synchronize: Any) -> Any:
        backend = synchronize.__self__
        return backend.scripted() if hasattr(backend, "scripted") else stages_timer(synchronize)

    def doubts(impl: Any, *others: Any) -> Iterable[str]:
        return [] if hasattr(impl, "scripted") else look_for_doubts(impl, *others)

    def time_new_lengths(impl: Any, *others: Any, **options: Any) -> Any:
        scripted = hasattr(impl.setting.backend, "scripted")
        return (None, "") if scripted else measure_new_lengths(impl, *others, **options)

    stages_timer = profile.HostTimer
    look_for_doubts, measure_new_lengths = evidence.doubts, evidence.on_new_lengths
    monkeypatch.setattr(evidence, "doubts", doubts)
    monkeypatch.setattr(evidence, "on_new_lengths", time_new_lengths)
    monkeypatch.setattr(_Engine, "runner", runner)
    monkeypatch.setattr(engine, "warm_up", warmed)
    monkeypatch.setattr(profile, "HostTimer", stage_timer)
