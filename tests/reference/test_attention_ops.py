"""The reference attention ops against float64, per token and head, out and log-sum-exp."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla.reference import REFERENCE

LATENT, EXPANDED = REFERENCE["latent_attention"], REFERENCE["expanded_attention"]
pairs = st.tuples(st.integers(0, 12), st.integers(0, 70))  # new tokens, history


def test_latent_attention_is_exact_to_rounding(check_latent: Any) -> None:
    check_latent(LATENT)


def test_expanded_attention_is_exact_to_rounding(check_expanded: Any) -> None:
    check_expanded(EXPANDED)


def test_expanded_attention_without_a_mask_sees_every_key(check_expanded: Any) -> None:
    check_expanded(EXPANDED, query_lens=(5, 1, 20), kv_lens=(3, 9, 20), causal=False)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(pairs, min_size=1, max_size=6), st.sampled_from([1, 2, 3, 5]), st.sampled_from([1, 4, 16, 64])
)
def test_latent_attention_serves_any_lengths(
    latent_problem: Any, assert_rows_close: Any, requests: list[tuple[int, int]], heads: int, page_size: int
) -> None:
    query_lens = [new for new, _ in requests]
    kv_lens = [new + old for new, old in requests]
    if sum(query_lens) == 0:
        query_lens[0], kv_lens[0] = 1, kv_lens[0] + 1
    problem = latent_problem(query_lens, kv_lens, heads=heads, page_size=page_size)
    (out, lse), (true_out, true_lse) = problem.run(LATENT), problem.truth()
    assert_rows_close(out, true_out, 1e-5)
    torch.testing.assert_close(lse.double(), true_lse, atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.lists(pairs, min_size=1, max_size=5), st.sampled_from([1, 3, 4]), st.booleans())
def test_expanded_attention_serves_any_lengths(
    check_expanded: Any, requests: list[tuple[int, int]], heads: int, causal: bool
) -> None:
    query_lens = [new + 1 for new, _ in requests]
    kv_lens = [new + 1 + old for new, old in requests]
    check_expanded(EXPANDED, query_lens, kv_lens, causal, heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_attention_of_a_request_without_keys_is_zero_and_minus_infinity(
    latent_problem: Any, dtype: torch.dtype
) -> None:
    problem = latent_problem([1, 2, 1], [0, 7, 0], dtype=dtype)
    out, lse = problem.run(LATENT)
    empty = [0, 3]
    assert (out[empty] == 0).all()
    assert (lse[empty] == -torch.inf).all()
    assert out[1:3].isfinite().all()
    assert lse[1:3].isfinite().all()


def test_latent_attention_of_only_empty_requests_is_zero(latent_problem: Any) -> None:
    out, lse = latent_problem([1, 1], [0, 0]).run(LATENT)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_queries_before_the_first_key_see_nothing(latent_problem: Any) -> None:
    problem = latent_problem([4, 3], [2, 3])  # the first two queries end before the request's first key
    (out, lse), (true_out, true_lse) = problem.run(LATENT), problem.truth()
    assert (out[:2] == 0).all()
    assert (lse[:2] == -torch.inf).all()
    torch.testing.assert_close(out.double(), true_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), true_lse, atol=1e-5, rtol=0)


def test_expanded_attention_of_a_segment_without_keys_is_zero_and_minus_infinity(check_expanded: Any) -> None:
    check_expanded(EXPANDED, query_lens=(2, 1), kv_lens=(0, 2), causal=True)
    check_expanded(EXPANDED, query_lens=(2, 1), kv_lens=(0, 2), causal=False)


def test_a_segment_without_queries_is_skipped(check_expanded: Any) -> None:
    check_expanded(EXPANDED, query_lens=(2, 0, 1), kv_lens=(4, 3, 2), causal=True)


def test_cutting_long_queries_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, check_latent: Any, check_expanded: Any
) -> None:
    monkeypatch.setattr("mla.reference.attention.queries_per_call", lambda heads, keys: 4)
    check_latent(LATENT)
    check_expanded(EXPANDED)


def test_large_logits_overflow_nothing(latent_problem: Any) -> None:
    problem = latent_problem([3, 1], [20, 40])
    problem.q *= 1e6
    out, lse = problem.run(LATENT)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert lse.abs().max() > 1e5  # the logits really were large


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_strided_query_and_output_give_the_same_bits(latent_problem: Any, dtype: torch.dtype) -> None:
    problem = latent_problem([3, 5], [9, 30], dtype=dtype)
    out, lse = problem.run(LATENT)
    wide = torch.zeros(*problem.q.shape[:2], problem.q.shape[2] + 5, dtype=dtype)
    wide[..., 5:] = problem.q
    problem.q = wide[..., 5:]
    again = problem.run(LATENT)
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])
