"""`capacity`: what the command prints and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

Bench = Callable[..., Any]


def test_the_command_shows_the_layout_that_was_asked_for_first(bench: Bench) -> None:
    done = bench(
        "capacity", "--config", "deepseek-r1", "--memory", "80GiB", "--layers", "61", "--parallel", "tp=8"
    )
    assert done.code == 0
    first, second = done.out.splitlines()[1:3]
    assert first.split() == ["tp=8", "4.16", "GiB", "75.8", "GiB", "1,158,781", "8", "88%"]
    assert second.startswith("dcp=8 ")
    more = bench("capacity", "--memory", "1 MB", "--json")
    assert json.loads(more.out)[0]["tokens"] == 0
    assert "no room" in bench("capacity", "--memory", "1 MB").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--memory", "8"), "'8' is not a valid amount of memory, such as 80GiB or 64GB"),
        (("--memory", "0GiB"), "'0GiB' is not a valid amount of memory"),
        ((), "Missing option '--memory'. Give that of one device, such as --memory 80GiB."),
        (("--memory", "8GB", "--parallel", "tp=3"), "splits heads over 3 ranks"),
        (("--memory", "8GB", "--parallel", "tp"), "a layout is written as in 'tp=2,dcp=2'"),
        (("--memory", "8GB", "--config", "none"), "unknown config 'none'"),
    ],
)
def test_mistakes_are_one_sentence(bench: Bench, arguments: tuple[str, ...], message: str) -> None:
    done = bench("capacity", *arguments)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
