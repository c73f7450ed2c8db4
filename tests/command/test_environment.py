"""The load of other processes, and installations that are mixed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mla.command import environment
from mla.command.environment import OtherLoad


@pytest.mark.parametrize(
    ("used", "threads", "said"),
    [(16.0, 2, "1.6 of 2"), (16.0, 1, "1.6 of 2"), (2.0, 2, ""), (9.0, 1, ""), (90.0, 2, "2.0 of 2")],
)
def test_others_count_where_this_process_needed_their_cpus(
    monkeypatch: pytest.MonkeyPatch, used: float, threads: int, said: str
) -> None:
    seconds, clock = iter((5.0, 5.0 + used)), iter((100.0, 110.0))
    monkeypatch.setattr(environment, "_seconds_of_others", lambda: next(seconds))
    monkeypatch.setattr(environment.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    assert OtherLoad().remark(threads) == said


def test_what_nobody_tells_is_no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_seconds_of_others", lambda: None)
    assert OtherLoad().remark(2) == ""


def test_the_old_and_the_new_name_of_the_distribution_are_a_mixed_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.metadata, "version", {"mla": "0.1.0", "mla-bench": "0.2.0"}.__getitem__)
    note = environment.mixed_installation()
    assert note is not None
    assert "run `pip uninstall mla mla-bench`, then `pip install . ./backends ./plugins/NAME` in the" in note
