"""A reference that was made slow is named: what is measured beside it is not fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from opponents.slow_reference import PatchedReference

Play = Callable[..., Any]


@pytest.mark.parametrize("ms", [2.0, 0.5])
@pytest.mark.parametrize("how", ["table", "class"])
def test_a_reference_that_a_plugin_replaced(play: Play, how: str, ms: float) -> None:
    duel = play(PatchedReference(how, ms), implementations="mla,mla-reference")
    reference = duel.case("mla-reference")
    named = "mla.reference" in duel.out + duel.err + reference.check.reason
    assert named or reference.latency_ms is None, str(duel)
