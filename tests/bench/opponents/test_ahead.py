"""Work cannot be done before its clock starts: what the next forward reads is not there yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from opponents.ahead import Ahead

Play = Callable[..., Any]


@pytest.mark.parametrize("scenario", ["prefill", "decode"])
@pytest.mark.parametrize("whole", [False, True], ids=["the next forward", "the whole pass"])
def test_a_forward_that_is_computed_while_the_runner_waits(play: Play, whole: bool, scenario: str) -> None:
    opponent = Ahead(whole)
    duel = play(opponent, scenario)
    assert duel.lost or opponent.hardly_eased, str(duel)
