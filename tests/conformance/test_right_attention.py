"""Attention as fast kernels do it is right: no check may call its rounding a fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flash import Flash

from mla.conformance.report import CheckResult

Run = Callable[..., list[CheckResult]]
# Where rounding counts most: aimed queries, even ones, long contexts, parts that are merged.
CHECKS = ("formula", "grid", "tiles", "alive", "shares")


@pytest.mark.usefixtures("smaller")
@pytest.mark.parametrize(("tile", "splits"), [(64, 1), (128, 3)])
@pytest.mark.parametrize("kind", ["latent", "expanded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_flash_attention_passes(
    judge: Run, sound: Any, kind: str, tile: int, splits: int, dtype: torch.dtype
) -> None:
    op = Flash(f"{kind}_attention/1", tile, splits)
    checks = [f"{kind}.{check}[mine-*]" for check in CHECKS]
    results = judge(sound(ops={"mine": op}), *checks, dtypes=(dtype,))
    assert len(results) >= 4
    assert [(result.id, result.status, result.reason) for result in results if result.status != "pass"] == []
