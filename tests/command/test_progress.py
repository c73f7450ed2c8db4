"""Progress where stderr is no terminal: nothing from short work, a line now and then from long work."""

from __future__ import annotations

import pytest

from mla.command import display
from mla.command.display import EVERY, Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list whose last entry is the time."""
    times = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: times[-1])
    return times


def test_short_work_is_silent(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(100.0) as bar:
        for second in range(int(EVERY)):
            clock.append(float(second))
            bar.advance("timing", 10.0)
    assert capsys.readouterr().err == ""


def test_long_work_says_now_and_then_what_runs_and_how_much_is_done(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(300.0) as bar:
        for second in range(1, 211):
            clock.append(float(second))
            bar.advance(f"forward {second}", 1.0)
    assert capsys.readouterr().err.splitlines() == [
        "running    forward 30, 10% of the plan",
        "running    forward 90, 30% of the plan",
        "running    forward 210, 70% of the plan",
    ]


def test_news_makes_the_next_line_wait(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(100.0) as bar:
        for second in range(1, 60):
            clock.append(float(second))
            if second == 29:
                bar.say("1 of 2  prefill: mla 3 ms")
            bar.advance(f"forward {second}", 1.0)
    assert capsys.readouterr().err.splitlines() == [
        "1 of 2  prefill: mla 3 ms",
        "running    forward 59, 59% of the plan",
    ]
