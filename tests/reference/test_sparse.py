"""Selections in fixed shapes, as on a device, and the bytes of index keys: drawn cases have the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sparse_problem import SparseBatch, indexer_spec

from mla.cache.formats import find_format
from mla.cache.index_formats import IndexFp8, index_codec, index_keys
from mla.errors import CacheFormatError
from mla.reference import REFERENCE, sparse


def select(
    batch: SparseBatch,
    topk: int,
    index_format: str = "",
    heads: int = 3,
    plan: Callable[[Any], Any] | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the selection [T, topk], and the true scores of what each query sees."""
    keys, q = batch.normal(sum(batch.kv_lens), 8), batch.normal(batch.tokens, heads, 8)
    weights = batch.normal(batch.tokens, heads)
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


def test_an_unknown_index_format_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown index format 'fp9'.*Formats: plain, fp8"):
        index_codec("fp9", 128)
    for other in (8, ["fp8"], b"fp8"):
        with pytest.raises(CacheFormatError, match=r"unknown index format .* Formats: plain, fp8\.$"):
            index_codec(other, 128)  # type: ignore[arg-type]
        with pytest.raises(CacheFormatError, match=r"unknown cache format .* Formats: bf16"):
            find_format(other)  # type: ignore[arg-type]
