"""A reference that was made slow is named: what is measured beside it is not fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from opponents.slow_reference import PatchedReference, SlowsEvidence, SlowsOthers

Play = Callable[..., Any]


@pytest.mark.parametrize(("how", "ms"), [("table", 2.0), ("class", 0.5)])
def test_a_reference_that_a_plugin_replaced(play: Play, how: str, ms: float) -> None:
    duel = play(PatchedReference(how, ms), implementations="mla,mla-reference")
    reference = duel.case("mla-reference")
    named = "mla.reference" in duel.out + duel.err + reference.check.reason
    assert named or reference.latency_ms is None, str(duel)


@pytest.mark.parametrize("ms", [5.0, 20.0])
def test_a_wait_that_is_slow_for_others_alone(play: Play, ms: float) -> None:
    """An idle device is waited for as long as the reference's forwards take: nobody's wait is believed."""
    duel = play(SlowsOthers(ms), implementations="mla,mla-reference")
    assert duel.lost, str(duel)
    assert "synchronize" in duel.case().check.reason


@pytest.mark.parametrize("order", ["mla,mla-reference", "mla-reference,mla"])
@pytest.mark.parametrize("kind", [SlowsOthers, SlowsEvidence])
def test_a_wait_that_goes_on_after_forwards_of_others_alone(
    play: Play, kind: type[SlowsOthers], order: str
) -> None:
    """An idle device is waited for in no time, and so are own ops where they are timed."""
    duel = play(kind(20.0, idle=False), implementations=order)
    reference = duel.case("mla-reference")
    assert (duel.code, reference.check.status, reference.latency_ms) == (6, "doubtful", None), str(duel)
    assert "until `synchronize` returns, but is done after" in reference.check.reason
