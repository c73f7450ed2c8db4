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


def test_a_cache_format_is_counted(bench: Bench) -> None:
    tokens = {
        name: json.loads(bench("capacity", "--memory", "1GB", "--json", "--cache-format", name).out)[0][
            "tokens"
        ]
        for name in ("bf16", "fp8_ds_mla", "fp8:0.5")
    }
    for name, size in (("fp8_ds_mla", 656), ("fp8:0.5", 576)):
        assert 0 <= tokens[name] - tokens["bf16"] * 1152 // size <= 2  # whole tokens of the same room


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--memory", "8"), "'8' is not a valid amount of memory, such as 80GiB or 64GB"),
        (("--memory", "0GiB"), "'0GiB' is not a valid amount of memory"),
        ((), "Missing option '--memory'. Give that of one device, such as --memory 80GiB."),
        (("--memory", "8GB", "--parallel", "tp=3"), "splits heads over 3 ranks"),
        (("--memory", "8GB", "--parallel", "tp"), "a layout is written as in 'tp=2,dcp=2'"),
        (("--memory", "8GB", "--config", "none"), "unknown config 'none'"),
        (
            ("--memory", "8GB", "--index-format", "fp8"),
            "has no indexer, and no index keys: omit it.",
        ),
        (
            ("--memory", "8GB", "--config", "glm-5", "--index-format", "fp9"),
            "unknown index format 'fp9'. Did you mean 'fp8'? Choose from: plain, fp8.",
        ),
        (("--memory", "8GB", "--cache-format", "fp9"), "--cache-format: unknown cache format 'fp9'"),
    ],
)
def test_mistakes_are_one_sentence(bench: Bench, arguments: tuple[str, ...], message: str) -> None:
    done = bench("capacity", *arguments)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
