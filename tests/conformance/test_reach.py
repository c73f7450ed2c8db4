"""Checks beyond 32 bits go as far as memory allows, and refuse where there is too little, whoever notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from wrong_attention.base import FAR, Latent
from wrong_ops.base import SMALL_OPS, mutant

from mla.conformance.checks import ops as reach
from mla.conformance.report import CheckResult

Run = Callable[..., list[CheckResult]]
OF_OPS = (*(f"{kind}.far_rows" for kind in SMALL_OPS), "write_latent.far_slots")
TOO_MANY = 1 << 46  # numbers: more bytes than a process has addresses for, so that no system grants them


@pytest.mark.parametrize("check", [*OF_OPS, "latent.far_pages", "expanded.far_rows"])
def test_memory_that_the_system_does_not_grant_is_a_refusal(
    judge: Run, sound: Any, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    """Even if it said that so much is free."""
    monkeypatch.setattr(reach, "PLACES", (TOO_MANY,))
    monkeypatch.setattr(reach.host, "memory_available", lambda: 1 << 60)
    (result,) = judge(sound(), check)
    assert (result.status, result.cases.passed) == ("refused", 0)
    assert "GB could not be allocated" in result.refusals[0].reason


def copies(*_: Any, **__: Any) -> None:
    torch.empty(TOO_MANY)


def raises(*_: Any, **__: Any) -> None:
    raise RuntimeError("an illegal memory access")


@pytest.mark.parametrize(("body", "status"), [(copies, "refused"), (raises, "fail")])
@pytest.mark.parametrize("check", OF_OPS)
def test_an_op_may_find_no_memory_for_a_copy_and_raise_nothing_else(
    judge: Run, sound: Any, check: str, body: Any, status: str
) -> None:
    backend = sound(ops={"mine": mutant(check.partition(".")[0], body)})
    (result,) = judge(backend, f"{check}[mine-*]")
    assert result.status == status
    assert ("illegal memory access" in result.reason) == (status == "fail")


def test_a_cache_is_as_large_as_there_is_memory_for(
    judge: Run, sound: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(available: int | None) -> CheckResult:
        monkeypatch.setattr(reach.host, "memory_available", lambda: available)
        (result,) = judge(sound(ops={"mine": Latent()}), "latent.far_pages[mine-*]")
        return result

    monkeypatch.setattr(reach, "PLACES", (2 * FAR, FAR))
    assert judged(16 * FAR).note == "0.034 GB from the start"
    assert judged(8 * FAR).note == "0.017 GB from the start"  # and a copy in float32, if an op makes one
    assert (judged(8 * FAR - 1).status, judged(None).status) == ("refused", "refused")
    assert judged(8 * FAR - 1).refusals[0].reason == "there is no room for 0.017 GB"
    assert judged(None).reason == "how much memory is free is not known"


def test_the_reference_finds_pages_as_far_as_this_machine_goes(
    judge: Run, sound: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the pages of the requests is touched, so that this takes address space and no memory."""
    monkeypatch.setattr(reach, "PLACES", (1 << 32, 1 << 31, 1 << 30))
    (result,) = judge(sound(), "latent.far_pages[reference-bfloat16]", dtypes=(torch.bfloat16,))
    assert result.status in ("pass", "refused"), result.reason
