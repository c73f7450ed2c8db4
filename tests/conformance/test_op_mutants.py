"""How far checks of index widths reach, as memory allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from wrong_attention.base import FAR, Latent

from mla.conformance import reach
from mla.conformance.report import CheckResult

Run = Callable[..., list[CheckResult]]


def test_a_cache_that_there_is_no_memory_for_is_refused(
    judge: Run, sound: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(available: int | None) -> CheckResult:
        monkeypatch.setattr(reach.host, "memory_available", lambda: available)
        (result,) = judge(sound(ops={"mine": Latent()}), "latent.far_pages[mine-*]")
        return result

    monkeypatch.setattr(reach, "PLACES", (2 * FAR, FAR))
    assert judged(16 * FAR).note == "0.034 GB from the start"
    assert judged(8 * FAR).note == "0.017 GB from the start"  # and a copy in float32, if an op makes one
    assert (judged(8 * FAR - 1).status, judged(8 * FAR - 1).reason) == (
        "refused",
        "there is no room for 0.017 GB",
    )
    assert judged(None).reason == "how much memory is free is not known"


def test_the_reference_finds_pages_as_far_as_this_machine_goes(
    judge: Run, sound: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the pages of the requests is touched, so that this takes address space and no memory."""
    monkeypatch.setattr(reach, "PLACES", (1 << 32, 1 << 31, 1 << 30))
    (result,) = judge(sound(), "latent.far_pages[reference-bfloat16]", dtypes=(torch.bfloat16,))
    assert result.status in ("pass", "refused"), result.reason
