"""The kernels of `select_latents`: judged by true scores, and the best of given scores by sorting them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import BestCase, select

from mla_backends.api import IndexerSpec
from mla_backends.triton_ops import selection
from mla_backends.triton_ops.jit import selection as jit
from mla_backends.triton_ops.launcher import Launcher
from mla_backends.triton_ops.selection import SelectLatents

FP8 = {"index_format": "fp8", "token_bytes": 52}
LONG_CONTEXT = 131_072 + 77
Draw = Callable[..., torch.Tensor]
# Scores [t, n] by what may go wrong with them.
DRAWS: dict[str, Draw] = {
    "of either sign": lambda *size, **given: torch.randn(*size, **given),
    "all below 0": lambda *size, **given: -torch.rand(*size, **given) - 0.5,
    "of any size": lambda *size, **given: torch.randn(*size, **given) * 10 ** (60 * torch.rand(*size) - 35),
    "tied": lambda *size, **given: torch.randint(-2, 2, size, **given).float(),
    "zeros of either sign": lambda *size, **given: torch.randint(-1, 2, size, **given).float().sign() * 0.0,
    "alike but for the last bits": lambda *size, **given: (
        torch.randint(0, 50, size, **given).add(0x3F800000).int().view(torch.float32)
    ),
    "denormal": lambda *size, **given: torch.randint(0, 99, size, **given).int().view(torch.float32),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make steps of few scores, so that a row has many."""
    monkeypatch.setattr(selection, "TILE", 64)


def check(case: Any) -> None:
    assert case.wrong() == []


# ---------------------------------------------------------------------------------------- the whole op
@pytest.mark.parametrize("page", [1, 16, 64])
@pytest.mark.parametrize("stored", [{}, FP8], ids=["plain", "fp8"])
@pytest.mark.usefixtures("small")
def test_selections_by_scores(page: int, stored: dict[str, Any]) -> None:
    check(select((2, 0, 3, 1), (70, 9, 4, 133), 24, page_size=page, **stored))


def test_tokens_that_are_scored_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "SCORES_BYTES", 4 * 400)
    check(select((3, 2), (70, 130), 24, page_size=16))


@pytest.mark.usefixtures("small")
def test_scores_that_follow_lengths_after_planning() -> None:
    check(select((2, 1), (70, 33), 24, planned=(9, 200)))


def test_as_many_keys_as_a_long_context_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "KEYS", 4096)
    check(select((1,), (LONG_CONTEXT,), 2048, heads=2, depth=16, page_size=64))


@pytest.mark.parametrize("trouble", ["raises", "is wrong"])
def test_torch_selects_where_the_kernel_does_not(monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    def fail(grid: Any) -> Callable[..., None]:
        def started(**arguments: Any) -> None:
            if trouble == "raises":
                raise AttributeError("module 'triton.language' has no attribute 'histogram'")

        return started

    monkeypatch.setattr(
        jit, "take_best", type("Kernel", (), {"__getitem__": lambda self, grid: fail(grid)})()
    )
    op, spec = SelectLatents(Launcher()), IndexerSpec(5, 48, 24, 24, torch.bfloat16, torch.device("cpu"))
    assert op.preflight(spec) == []
    (remark,) = op.remarks
    why = "gives wrong results" if trouble == "is wrong" else "has no attribute 'histogram'"
    assert remark.startswith("torch's top-k selects, as our kernel ")
    assert why in remark
    check(select((2, 0, 3, 1), (70, 9, 4, 133), 24, by_torch=True))


def test_a_kernel_that_passes_its_trial_is_taken() -> None:
    op = SelectLatents(Launcher())
    assert op.preflight(IndexerSpec(5, 48, 24, 24, torch.bfloat16, torch.device("cpu"))) == []
    assert op.remarks == []


# ------------------------------------------------------------------------------------ the best of scores
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("topk", [1, 24, 100])
@pytest.mark.parametrize("how", DRAWS)
def test_the_best_are_those_of_a_sort(how: str, topk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    seen = torch.randint(0, 400, (4,), generator=generator).tolist()
    check(BestCase(DRAWS[how](6, 400, generator=generator), (*seen, topk, topk + 1), topk))


@pytest.mark.parametrize("how", ["of either sign", "tied", "alike but for the last bits"])
def test_the_best_of_a_long_row(how: str) -> None:
    scores = DRAWS[how](1, LONG_CONTEXT, generator=torch.Generator().manual_seed(1))
    check(BestCase(scores, (LONG_CONTEXT,), 2048, tile=selection.TILE))


def test_of_equal_scores_the_first_are_taken() -> None:
    assert BestCase(torch.zeros(1, 300), (300,), 9).chosen().tolist() == [[*range(9)]]
    alternating = torch.tensor([[0.0, 3.0] * 100])
    assert BestCase(alternating, (200,), 103).chosen().tolist() == [sorted([*range(1, 200, 2), 0, 2, 4])]
