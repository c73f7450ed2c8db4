"""The suite on the backend whose ops are interpreted kernels, with fewer cases than by its command."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import interpreted
import pytest
import torch
from smaller_cases import make_smaller

from mla.cases import drawn
from mla.conformance.registry import DRAWN
from mla.conformance.report import CheckResult
from mla.conformance.selection import Xfails
from mla.conformance.suite import carry_out, trials
from mla.conformance.trial import BackendUnderTest, Drawing, Trial

SMALL = (
    5000  # of `smaller_cases`: an interpreter's time goes by programs, of which large cases start thousands
)
# Checks that start most of all, and differ from others in a number of programs.
LEFT_OUT = {"select_latents.positions", "sparse_latent_attention.positions"}
GRAPHS = {"latent.graph", "latent.graph_lengths"}  # this device has none; an emulated one has
HOST = {"state", "contract"}  # of ops without a plan, what the host does is nothing to interpret
DRAWS = 12
TINY_DRAWS = {
    "NUMBERS": 1 << 12,
    "REPEATS": (20,),
    "LOGITS": 1 << 10,
    "ROOMS": (1, 2),
    "LONG_ROOM": 2,
    "HUGE": 2050,
    "HUGE_ROOM": 32,
    "MAX_REQUESTS": 40,
    "FAR_SLOTS": 1 << 11,
}
LAYERS = ("layer.decode", "layer.mixed")


@pytest.fixture(autouse=True)
def _smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    make_smaller(monkeypatch, SMALL)


def subject(**more: Any) -> BackendUnderTest:
    return BackendUnderTest(interpreted.Interpreted(), "interpreted", **more)


def is_of_a_kernel(trial: Trial) -> bool:
    """Return whether a check is about one of the kernels, and worth its time."""
    planned = trial.of == "triton_latent" or trial.check.fails not in HOST
    return (
        trial.of.startswith("triton_")
        and planned
        and trial.check.fails != DRAWN
        and trial.check.id not in LEFT_OUT | GRAPHS
    )


def results(chosen: Iterable[Trial]) -> dict[str, CheckResult]:
    """Run the first and the last case of each check."""
    few = (replace(each, chosen=frozenset((1, len(each.all_labels())))) for each in chosen)
    return {each.id: carry_out(each, Xfails()) for each in few}


def test_every_kernel_keeps_the_contract() -> None:
    answers = results(filter(is_of_a_kernel, trials(subject(), (torch.bfloat16,))))
    assert {result.id: result.reason for result in answers.values() if result.status != "pass"} == {}
    assert len(answers) >= 31
    assert not any(result.cases.refused for result in answers.values())


def test_a_layer_of_interpreted_kernels_keeps_the_contract() -> None:
    answers = results(trials(subject(), (torch.bfloat16,), LAYERS))
    assert {result.id: result.reason for result in answers.values() if result.status != "pass"} == {}


@pytest.mark.parametrize(
    "check",
    [
        f"{kind}.drawn"
        for kind in (
            "rms_norm",
            "rotate_query",
            "write_latent",
            "latent",
            "expanded",
            "sparse_latent_attention",
            "select_latents",
        )
    ],
)
def test_drawn_cases_of_a_kernel(monkeypatch: pytest.MonkeyPatch, check: str) -> None:
    """Small ones: an interpreter takes seconds for what a card does in microseconds."""
    for name, value in TINY_DRAWS.items():
        monkeypatch.setattr(drawn, name, value)
    device = subject(drawing=Drawing(DRAWS, seed=5))
    chosen = [trial for trial in trials(device, (torch.bfloat16,), [check]) if trial.of.startswith("triton_")]
    (result,) = results(chosen).values()
    assert (result.status, result.failures) == ("incomplete", [])
    assert result.drawn is not None
    assert result.drawn.judged == DRAWS
