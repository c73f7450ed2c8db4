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


def test_long_work_says_now_and_then_what_runs_and_how_long_the_rest_takes(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(300.0) as bar:
        for second in range(1, 211):
            clock.append(float(second))
            bar.advance(f"forward {second}", 1.0)
    assert capsys.readouterr().err.splitlines() == [
        "running    forward 30, about 4 min left",
        "running    forward 90, about 4 min left",
        "running    forward 210, about 90 s left",
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
        "running    forward 59, about 41 s left",
    ]


def test_no_more_time_is_left_than_until_the_next_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """The bar advances unevenly: none for limits, much for forwards that are left out.

    Past both ends, as on a busy machine, nothing is said: 1500 of 10000 forwards in 200 s were "19 min left".
    """
    with Progress(10000.0, ends=(60.0, 150.0)) as bar:
        for second, done in ((31.0, 0.0), (95.0, 1500.0), (225.0, 0.0)):
            clock.append(second)
            bar.advance("measuring", done)
    with Progress(100.0) as bar:
        clock.append(300.0)
        bar.advance("starting", 0.0)
    assert capsys.readouterr().err.splitlines() == [
        "running    measuring, about 29 s left",
        "running    measuring, about 55 s left",
        "running    measuring",
        "running    starting",
    ]
