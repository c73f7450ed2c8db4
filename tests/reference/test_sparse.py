"""The references of sparse attention against float64, written out query by query."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from float64_attention import Outputs, attend
from op_inputs import angles
from sparse_problem import SparseBatch, attention_spec, indexer_spec

from mla.cache.formats import find_format
from mla.cache.index_formats import IndexFp8, index_codec, index_keys
from mla.errors import CacheFormatError
from mla.reference import REFERENCE, sparse

LENGTHS = [
    ((1,), (9,)),
    ((1, 1, 1), (40, 3, 17)),
    ((3, 1, 5, 0), (33, 1, 5, 6)),
    ((2, 2, 1), (2, 0, 64)),
]


def select(
    batch: SparseBatch,
    topk: int,
    index_format: str = "",
    heads: int = 3,
    ties: bool = False,
    plan: Callable[[Any], Any] | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the selection [T, topk], and the true scores of what each query sees."""
    keys, q = batch.normal(sum(batch.kv_lens), 8), batch.normal(batch.tokens, heads, 8)
    weights = -batch.normal(batch.tokens, heads).abs() if ties else batch.normal(batch.tokens, heads)
    q = -keys.abs().amax() * torch.ones_like(q) if ties else q
    keys = keys.abs() if ties else keys
    cache = batch.index_cache(keys, index_format)
    if index_format:
        keys = index_keys(cache, IndexFp8(8)).flatten(0, 1)[batch.pages.slots]
    out = torch.full((batch.tokens, topk), 7, dtype=torch.int32)
    op, spec = REFERENCE["select_latents"], indexer_spec(heads, 8, 4, topk, index_format=index_format)
    named = {"cache_format": index_format} if index_format else {}
    state = op.prepare(spec, batch) if plan is None else plan(spec)
    op(state, q=q, weights=weights, cache=cache, **batch.tables, out=out, **named)
    return out, batch.true_scores(q, weights, keys)


def check_selection(out: torch.Tensor, scores: list[torch.Tensor]) -> None:
    for row, true in zip(out.tolist(), scores, strict=True):
        count = min(len(row), len(true))
        assert row[count:] == [-1] * (len(row) - count)
        chosen = row[:count]
        assert len({*chosen}) == count
        assert all(0 <= place < len(true) for place in chosen)
        if count:
            assert true[chosen].min() >= true.topk(count).values[-1] - 1e-5


@pytest.mark.parametrize("topk", [1, 5, 16, 70])
@pytest.mark.parametrize(("query_lens", "kv_lens"), LENGTHS)
@pytest.mark.parametrize("index_format", ["", "fp8"])
def test_the_best_visible_tokens_are_selected(query_lens, kv_lens, topk, index_format) -> None:
    check_selection(*select(SparseBatch(query_lens, kv_lens), topk, index_format))


@pytest.mark.parametrize("bytes_at_once", [1, 1 << 20])
@pytest.mark.parametrize(("queries", "kv_lens"), [(1, (40, 3, 17)), (2, (33, 2, 70)), (3, (9, 3))])
@pytest.mark.parametrize("index_format", ["", "fp8"])
def test_a_decode_step_on_a_device_follows_lengths_that_were_not_planned(
    monkeypatch: pytest.MonkeyPatch,
    queries: int,
    kv_lens: tuple[int, ...],
    index_format: str,
    bytes_at_once: int,
) -> None:
    """Its launches are the same whatever the lengths, and what a request does not own is NaN."""
    monkeypatch.setattr(sparse, "LOGITS_BYTES", bytes_at_once)
    planned, batch = (
        SparseBatch((queries,) * len(kv_lens), lens) for lens in ((queries,) * len(kv_lens), kv_lens)
    )

    def plan(spec: Any) -> Any:
        state = REFERENCE["select_latents"].prepare(replace(spec, device=torch.device("meta")), planned)
        assert state.graph_safe
        return state

    for topk in (1, 5, 16, 70):
        check_selection(*select(batch, topk, index_format, plan=plan))


def test_runs_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = select(SparseBatch((9, 7), (30, 7)), 6)
    monkeypatch.setattr(sparse, "LOGITS_BYTES", 4 * 3 * 30 * 2)
    parts, _ = select(SparseBatch((9, 7), (30, 7)), 6)
    assert torch.equal(whole, parts)


def test_scores_that_are_all_zero_select_nothing_hidden() -> None:
    check_selection(*select(SparseBatch((4, 6), (4, 20)), 5, ties=True))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("turned", [0, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_index_key_is_the_norm_with_bias_and_its_first_channels_turned(interleaved, turned, dtype) -> None:
    batch = SparseBatch((5,), (5,))
    k, weight, bias = (batch.normal(*shape, dtype=dtype) for shape in ((5, 8), (8,), (8,)))
    cos_sin, slots = angles(5, turned), torch.tensor([9, 2, 0, 11, 5])
    cache = torch.full((3, 4, 8), 7.0, dtype=dtype)
    given = {"k": k * 3 + 1, "weight": weight, "bias": bias, "eps": 1e-2, "cos_sin": cos_sin}
    REFERENCE["write_index_key"](**given, interleaved=interleaved, slots=slots, cache=cache)
    true = torch.nn.functional.layer_norm(given["k"].double(), (8,), weight.double(), bias.double(), 1e-2)
    for pair in range(turned // 2):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + turned // 2)
        cos, sin = cos_sin[:, pair].double(), cos_sin[:, turned // 2 + pair].double()
        x, y = true[:, a].clone(), true[:, b].clone()
        true[:, a], true[:, b] = x * cos - y * sin, y * cos + x * sin
    bound = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(cache.view(-1, 8)[slots].double(), true, rtol=bound, atol=bound / 10)
    assert (cache.view(-1, 8)[[1, 3, 4, 6, 7, 8, 10]] == 7).all()


def test_bytes_of_a_page_are_all_values_and_then_all_scales() -> None:
    codec, page = IndexFp8(8), 4
    keys = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-6], [1.0], [1e4]]
    )
    cache = torch.zeros(2, page, codec.token_bytes, dtype=torch.uint8)
    codec.write(cache, torch.tensor([1, 6, 3]), keys)
    scales = cache.view(2, -1)[:, page * 8 :].contiguous().view(torch.float32)
    for slot, key in zip((1, 6, 3), keys, strict=True):
        scale = scales[slot // page, slot % page]
        assert scale == 2.0 ** torch.ceil(torch.log2(key.abs().max().clamp_min(1e-4) / 448))
        codes = cache.view(2, -1)[slot // page, slot % page * 8 :][:8].view(torch.float8_e4m3fn)
        assert torch.equal(codes.float(), (key / scale).to(torch.float8_e4m3fn).float())
    back = index_keys(cache, codec).view(-1, 8)[[1, 6, 3]]
    assert torch.equal(back, codec.decode(codec.rows(cache).flatten(0, 1)[[1, 6, 3]])[0])
    assert ((back - keys).abs() <= keys.abs() * codec.relative / 2 + codec.least).all()


def attend_selected(
    batch: SparseBatch, topk: int, heads: int = 3, c: int = 16, r: int = 8
) -> tuple[Outputs, Outputs]:
    """Return out and lse of the reference, and the true ones, for random selections of any number."""
    keys, q = batch.normal(sum(batch.kv_lens), c + r), batch.normal(batch.tokens, heads, c + r)
    selection = torch.full((batch.tokens, topk), -1, dtype=torch.int32)
    true = (
        torch.zeros(batch.tokens, heads, c).double(),
        torch.full((batch.tokens, heads), -torch.inf).double(),
    )
    for token, first, seen in batch.queries():
        count = min(topk, seen)
        if token % 5 == 4:
            count //= 2
        chosen = torch.randperm(seen, generator=batch.draw)[:count]
        selection[token, :count] = chosen.int()
        picked = keys[first : first + seen][chosen]
        out, lse = attend(q[token][None], picked, picked[:, :c], 0.2, causal=False)
        true[0][token], true[1][token] = out[0], lse[0]
    op, out = REFERENCE["sparse_latent_attention"], torch.empty(batch.tokens, heads, c)
    lse, state = torch.empty(batch.tokens, heads), op.prepare(attention_spec(heads, c, r, topk), batch)
    tensors = {"q": q, "cache": batch.pages.cache(keys), **batch.tables, "selection": selection}
    op(state, **tensors, softmax_scale=0.2, out=out, lse=lse)
    return (out, lse), true


@pytest.mark.parametrize("topk", [1, 5, 16, 70])
@pytest.mark.parametrize(("query_lens", "kv_lens"), LENGTHS)
def test_attention_is_to_the_selection_alone(query_lens, kv_lens, topk, monkeypatch) -> None:
    results, true = attend_selected(SparseBatch(query_lens, kv_lens), topk)
    for result, wanted in zip(results, true, strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(sparse, "KEYS_BYTES", topk * 8 * 24 * 2)
    parts, _ = attend_selected(SparseBatch(query_lens, kv_lens), topk)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(results, parts, strict=True))


def test_an_unknown_index_format_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown index format 'fp9'.*Formats: fp8"):
        index_codec("fp9", 128)
    for other in (8, ["fp8"], b"fp8"):
        with pytest.raises(CacheFormatError, match=r"unknown index format .*: fp8; None is the layer's"):
            index_codec(other, 128)  # type: ignore[arg-type]
        with pytest.raises(CacheFormatError, match=r"unknown cache format .* Formats: bf16"):
            find_format(other)  # type: ignore[arg-type]
