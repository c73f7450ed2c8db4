"""Selections are judged by true scores: any order, any of a tie, and nothing that fp32 could not choose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla.reference.sparse import index_scores
from mla.verify.selections import judge_selection, true_scores, true_selection

Tensors = dict[str, torch.Tensor]


def problem(seed: int, seen: int, tokens: int = 3, heads: int = 4, d: int = 8) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"q": (tokens, heads, d), "weights": (tokens, heads), "keys": (seen, d)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def truth_of(parts: Tensors, topk: int) -> Tensors:
    tokens, seen = len(parts["q"]), len(parts["keys"])
    spans = [(0, max(0, seen - tokens + 1 + token)) for token in range(tokens)]
    return true_selection(*parts.values(), spans, topk, max(1, seen))


def chosen(parts: Tensors, topk: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a right selection in a random order, of scores rounded to `dtype`."""
    tokens, seen = len(parts["q"]), len(parts["keys"])
    scores = index_scores(*parts.values()).to(dtype).float()
    out = torch.full((tokens, topk), -1, dtype=torch.int32)
    for token in range(tokens):
        visible = max(0, seen - tokens + 1 + token)
        best = scores[token, :visible].topk(min(topk, visible)).indices
        out[token, : len(best)] = best[torch.randperm(len(best))].int()
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(0, 200), st.integers(1, 45), st.booleans())
def test_what_is_computed_is_right_in_any_order(seed: int, seen: int, topk: int, in_bf16: bool) -> None:
    """In bf16 where that is declared."""
    parts = problem(seed, seen)
    out = chosen(parts, topk, torch.bfloat16 if in_bf16 else torch.float32)
    assert judge_selection(out, truth_of(parts, topk), in_bf16=in_bf16)[1] == ""


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(12, 40), st.integers(1, 8), st.integers(0, 2))
def test_a_token_that_scores_lower_is_named(seed: int, seen: int, topk: int, token: int) -> None:
    """The next best takes the place of the best."""
    parts = problem(seed, seen)
    out, visible = chosen(parts, topk), seen - 2 + token
    order = index_scores(*parts.values())[token, :visible].argsort(descending=True)
    gap = index_scores(*parts.values())[token, order[[0, topk]]].double()
    out[token, :topk] = order[1 : topk + 1].int()
    ratio, said = judge_selection(out, truth_of(parts, topk))
    if gap[0] - gap[1] > 1e-4:
        assert ratio > 1
        assert f"row {token}" in said
        assert "scores higher" in said


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda out: out[1].copy_(out[1, :1].expand(5)), "name a token twice"),
        (lambda out: out[1, 4:].fill_(-1), "are not complete"),
        (lambda out: out[1, 4:].fill_(19), "that the query does not see"),
        (lambda out: out[1, 4:].fill_(-2), "that the query does not see"),
        (lambda out: out[1, 4:].fill_(2**31 - 1), "that the query does not see"),
    ],
)
def test_what_is_no_matter_of_scores_is_infinitely_wrong(spoil, said) -> None:
    parts = problem(1, 20)
    out, truth = chosen(parts, 5), truth_of(parts, 5)
    spoil(out)
    ratio, reason = judge_selection(out, truth)
    assert ratio == torch.inf
    assert said in reason
    assert "1 of 3" in reason


@pytest.mark.parametrize("behind", [0, 7, -2, 2**31 - 1])
def test_behind_the_last_stands_minus_one(behind: int) -> None:
    parts = problem(1, 4)
    out, truth = chosen(parts, 9), truth_of(parts, 9)
    assert judge_selection(out, truth) == (0.0, "")
    out[0, 6] = behind
    assert "behind the last: row 0" in judge_selection(out, truth)[1]


def test_any_of_a_tie_is_right() -> None:
    """Three keys of which ReLU leaves nothing tie as best, where the weight is negative."""
    q, weights = torch.ones(1, 1, 1), -torch.ones(1, 1)
    keys = torch.tensor([[0.4], [-1.0], [-2.0], [0.9], [-0.5]])
    truth = true_selection(q, weights, keys, [(0, 5)], 2, 5)
    right = [{1, 2}, {1, 4}, {2, 4}]
    for first in range(5):
        for second in range(5):
            out = torch.tensor([[first, second]], dtype=torch.int32)
            assert (judge_selection(out, truth)[1] == "") == ({first, second} in right)


def test_scores_in_bf16_may_be_one_unit_of_the_last_score_off() -> None:
    steps = torch.tensor([1.0, 1 + 2**-9, 1 + 2**-6, 2.0])
    q, weights = torch.ones(1, 1, 1), torch.ones(1, 1)
    truth = true_selection(q, weights, steps[:, None], [(0, 4)], 2, 4)
    for other, fine, coarse in ((2, True, True), (1, False, False), (0, False, False)):
        out = torch.tensor([[3, other]], dtype=torch.int32)
        assert (judge_selection(out, truth)[1] == "") == fine
        assert (judge_selection(out, truth, in_bf16=True)[1] == "") == coarse
    truth = true_selection(q, weights, steps[[0, 1, 3], None], [(0, 3)], 2, 3)
    near = torch.tensor([[2, 0]], dtype=torch.int32)  # a quarter of a unit below the best
    assert judge_selection(near, truth)[0] > 1
    assert judge_selection(near, truth, in_bf16=True)[0] <= 1


def test_a_bound_is_of_its_own_key() -> None:
    """A key that is a million times as large makes no other key's score uncertain."""
    parts = problem(3, 30, tokens=1)
    parts["keys"][7] *= 1e6
    scores, bounds = true_scores(*parts.values())
    assert bounds[0, 7] > 1e5 * bounds[0, 8]
    gap = (index_scores(*parts.values()).double() - scores).abs()
    assert (gap <= bounds).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([1, 64]))
def test_fp32_scores_are_within_their_bounds(seed: int, dtype: torch.dtype, heads: int) -> None:
    parts = problem(seed, 50, heads=heads, d=128)
    parts["q"], parts["keys"] = parts["q"].to(dtype), parts["keys"].to(dtype)
    scores, bounds = true_scores(*parts.values())
    assert ((index_scores(*parts.values()).double() - scores).abs() <= 0.5 * bounds).all()


@pytest.mark.parametrize("bad", [torch.zeros(2, 5, dtype=torch.int32), torch.zeros(3, 5, dtype=torch.int64)])
def test_another_shape_or_dtype_is_named(bad: torch.Tensor) -> None:
    parts = problem(1, 20)
    assert "instead of torch.int32 [3, k]" in judge_selection(bad, truth_of(parts, 5))[1]
