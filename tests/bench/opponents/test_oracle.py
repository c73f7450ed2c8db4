"""The expected outputs in the runner's memory are of no use as they are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from opponents.thief import Thief

Play = Callable[..., Any]


@pytest.mark.parametrize(
    ("dtype", "computes", "scenario"),
    [
        (torch.float64, False, "prefill"),
        (torch.float64, True, "decode"),
        (torch.float64, True, "prefill"),
        (torch.float32, True, "decode"),
    ],
)
def test_an_output_copied_from_the_oracle(
    play: Play, dtype: torch.dtype, computes: bool, scenario: str
) -> None:
    """It is that of other inputs, or its error is smaller than arithmetic of its dtype can make it."""
    opponent = Thief(dtype, computes)
    duel = play(opponent, scenario)
    assert duel.lost or opponent.hardly_eased, str(duel)
