"""Merging attention over disjoint keys."""

from __future__ import annotations

import pytest
import torch

from mla.parallel.context import merge


def attend(q: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and the natural log-sum-exp of plain attention."""
    logits = q @ keys.T
    return logits.softmax(dim=-1) @ keys, logits.logsumexp(dim=-1)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e-3])
def test_parts_give_the_whole(scale: float) -> None:
    q, keys = scale * torch.randn(7, 5).double(), torch.randn(40, 5).double()
    parts = [attend(q, keys[i::3]) for i in range(3)]
    out = torch.empty(7, 5)
    merge(
        torch.stack([part for part, _ in parts]).float(), torch.stack([lse for _, lse in parts]).float(), out
    )
    assert (out - attend(q, keys)[0]).abs().max() < 1e-5 * max(1, scale)


def test_a_part_without_keys_weighs_nothing_whatever_it_holds() -> None:
    parts = torch.tensor([[[1.0, 2.0]], [[torch.nan, torch.inf]]])
    out = torch.full((1, 2), torch.nan)
    merge(parts, torch.tensor([[700.0], [-torch.inf]]), out)
    assert out.tolist() == [[1.0, 2.0]]


def test_no_keys_at_all_give_zero() -> None:
    out = torch.full((1, 2), torch.nan)
    merge(torch.full((2, 1, 2), torch.nan), torch.full((2, 1), -torch.inf), out)
    assert out.tolist() == [[0.0, 0.0]]
