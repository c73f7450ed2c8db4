"""Forwards that were remembered in passes before: of no use on fresh inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from opponents.base import CONFIG
from opponents.memory import RemembersContext, RemembersForwards

Play = Callable[..., Any]

# Few requests have few turns, and many passes come back to them; of many, each has its sign.
WORKLOAD = """
[[scenario]]
name = "alone"
mode = "decode"
query_lens = [1]
history = [800]
runs = 8
passes = 40
warmups = 8

[[scenario]]
name = "two"
mode = "decode"
query_lens = [1, 1]
history = [600, 300]
runs = 4
passes = 10
warmups = 4

[[scenario]]
name = "sixteen"
mode = "decode"
query_lens = ["1*16"]
history = ["200*16"]
runs = 8
passes = 8
warmups = 2

[[scenario]]
name = "prompt"
mode = "prefill"
query_lens = [24]
history = [200]
runs = 600
passes = 10
warmups = 2
"""
HERE = ("--workload", "few.toml")


@pytest.fixture(autouse=True)
def _workload(tmp_path: Path) -> None:
    (tmp_path / "few.toml").write_text(WORKLOAD)


@pytest.mark.parametrize("scenario", ["alone", "sixteen", "prompt"])
def test_forwards_remembered_from_other_passes_are_of_no_use(play: Play, scenario: str) -> None:
    opponent = RemembersForwards()
    duel = play(opponent, scenario, *HERE)
    assert opponent.gains > 60, str(duel)
    assert duel.lost, str(duel)
    assert duel.case().check.reason.startswith("forwards on fresh inputs take "), str(duel)
    assert duel.case().check.reason.endswith(", as if results were remembered")


def test_nor_does_it_help_to_do_nothing_on_them(play: Play) -> None:
    """All turns are known by then, so only unknown inputs are answered from what is at hand."""
    opponent = RemembersForwards(idle=400)
    duel = play(opponent, "prompt", *HERE)
    assert duel.lost, str(duel)
    assert "outputs on fresh inputs are wrong: " in duel.case().check.reason, str(duel)


def test_nor_does_it_help_to_remember_what_was_made_of_the_history(play: Play) -> None:
    """Its keys and values are rebuilt in every forward, and its rows were the same in all passes."""
    opponent = RemembersContext(200, CONFIG["kv_lora_rank"], slow=60)
    duel = play(opponent, "prompt", *HERE, "--attention", "expanded")
    assert opponent.gains > 60, str(duel)
    assert duel.lost, str(duel)
    assert duel.case().check.reason.endswith(", as if results were remembered")


@pytest.mark.parametrize("scenario", ["alone", "sixteen", "prompt"])
def test_who_only_looks_up_and_computes_keeps_its_number(play: Play, scenario: str) -> None:
    duel = play(RemembersForwards(learns=False), scenario, *HERE)
    assert duel.stands, str(duel)
