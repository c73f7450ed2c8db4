"""A run that fails in the middle says why in one sentence and keeps what it had measured."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla.bench import results

Bench = Callable[..., Any]


@pytest.mark.parametrize("scenario", [(), ("--scenario", "decode")])
def test_an_op_that_raises_is_named_and_earlier_scenarios_are_kept(
    bench: Bench, small: list[str], scenario: tuple[str, ...]
) -> None:
    faulty = ("--backend", "fake-wrong-op", "-O", "fault=raise", "-O", "tokens=2")  # those of decode
    options = ["--warmups", "0", "--implementations", "mla", "-o", "run.json"]
    done = bench(*faulty, *small, *scenario, *options, fakes=["wrong_op"])
    assert done.code == 3
    assert done.error.startswith(
        "error: scenario 'decode' failed: RuntimeError: the device ran out of memory (fake_wrong_op.py:"
    )
    assert "3 lines" not in done.err
    kept = results.decode(Path("run.json").read_bytes()).cases
    assert [case.scenario for case in kept] == ([] if scenario else ["prefill"])
    assert ("Prefill Latency" in done.out) == (not scenario)


def test_an_op_is_blamed_by_its_own_line_and_name_where_torch_raises(bench: Bench, small: list[str]) -> None:
    options = ("--backend", "fake-wrong-op", "-O", "fault=inside", "--implementations", "mla")
    done = bench(*options, *small, "--scenario", "decode", fakes=["wrong_op"])
    assert done.code == 3
    assert re.fullmatch(
        r"error: scenario 'decode' failed: TypeError: layer_norm\(\).* "
        r"\(fake_wrong_op\.py:\d+ in normalized, op 'loop' of latent_attention\)\.",
        done.error,
    )


def test_a_clock_that_stands_still_is_refused(bench: Bench, small: list[str]) -> None:
    done = bench("--backend", "fake-virtual-clock", "-O", "script=0", *small, fakes=["virtual_clock"])
    assert done.code == 3
    assert done.error == "error: the host clock of this backend measured 0.0 ms for a forward."
