"""The load of other processes."""

from __future__ import annotations

import os

import pytest

from mla.command import environment
from mla.command.environment import OtherLoad


@pytest.mark.parametrize(
    ("used", "threads", "said"),
    [
        *((16.0, 2, "1.6 of 2"), (16.0, 1, "1.6 of 2"), (2.0, 2, ""), (9.0, 1, ""), (90.0, 2, "2.0 of 2")),
        (None, 2, ""),  # nobody tells
    ],
)
def test_others_count_where_this_process_needed_their_cpus(
    monkeypatch: pytest.MonkeyPatch, used: float | None, threads: int, said: str
) -> None:
    seconds, clock = iter((5.0, None if used is None else 5.0 + used)), iter((100.0, 110.0))
    monkeypatch.setattr(environment, "_seconds_of_others", lambda: next(seconds))
    monkeypatch.setattr(environment.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    assert OtherLoad().remark(threads) == said
