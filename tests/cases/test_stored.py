"""Ops over a quantised cache are judged by its codec: right ones are right in every format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from wrong_ops.formats import RIGHT

from mla.cases.drawn import Field, scenes
from mla.cases.played import Player, Scene

KINDS = {"write_latent/2": "write_latent", "latent_attention/2": "latent_attention"}


def played(op: Any, dtype: torch.dtype, count: int) -> list[tuple[Scene, str]]:
    """Return scenes over the op's format, drawn, and what is wrong with each."""
    from hypothesis import HealthCheck, Phase, given, settings

    outcomes: list[tuple[Scene, str]] = []
    field = Field(KINDS[op.contract], dtype, torch.device("cpu"), formats=tuple(op.cache_formats))
    player = Player(op, lambda case: None)

    @settings(
        max_examples=count, phases=[Phase.generate], deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(scenes(field).filter(lambda scene: scene.cases[0].spec.cache_format))
    def play(scene: Scene) -> None:
        outcomes.append((scene, player.play(scene)))

    play()
    return outcomes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", range(len(RIGHT)))
def test_right_ops_are_right(number: int, dtype: torch.dtype) -> None:
    outcomes = played(RIGHT[number](), dtype, 12)
    assert [(scene.label, reason) for scene, reason in outcomes if reason] == []
    assert len(outcomes) >= 5
