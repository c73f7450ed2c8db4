"""A check that takes more memory than there is refuses, whichever step notices; other errors are failures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from wrong_ops.base import SMALL_OPS, mutant

from mla.conformance import reach
from mla.conformance.report import CheckResult

Run = Callable[..., list[CheckResult]]
FAR_ROWS = tuple(f"{kind}.far_rows" for kind in SMALL_OPS)
# Numbers: more bytes than a process has addresses for, so that no system grants them.
TOO_MANY = 1 << 46


@pytest.mark.parametrize(
    "check", [*FAR_ROWS, "write_latent.far_slots", "latent.far_pages", "expanded.far_rows"]
)
def test_memory_that_the_system_does_not_grant_is_a_refusal(
    judge: Run, sound: Any, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    """Even if it said that so much is free."""
    monkeypatch.setattr(reach, "PLACES", (TOO_MANY,))
    monkeypatch.setattr(reach.host, "memory_available", lambda: 1 << 60)
    (result,) = judge(sound(), check)
    assert (result.status, result.cases.passed) == ("refused", 0)
    assert "GB could not be allocated" in result.refusals[0].reason


def raising(text: str) -> Callable[..., None]:
    def body(*_: Any, **__: Any) -> None:
        raise RuntimeError(text)

    return body


def copies(*_: Any, **__: Any) -> None:
    torch.empty(TOO_MANY)


@pytest.mark.parametrize("check", [*FAR_ROWS, "write_latent.far_slots"])
def test_a_copy_that_finds_no_memory_is_a_refusal(judge: Run, sound: Any, check: str) -> None:
    backend = sound(ops={"mine": mutant(check.partition(".")[0], copies)})
    (result,) = judge(backend, f"{check}[mine-*]")
    assert result.status == "refused"


@pytest.mark.parametrize("check", [*FAR_ROWS, "write_latent.far_slots"])
def test_another_error_is_a_failure(judge: Run, sound: Any, check: str) -> None:
    backend = sound(ops={"mine": mutant(check.partition(".")[0], raising("an illegal memory access"))})
    (result,) = judge(backend, f"{check}[mine-*]")
    assert result.status == "fail"
    assert "illegal memory access" in result.reason
