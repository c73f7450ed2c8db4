"""mate's wrapper under the name `flash_mla`: third generation, but told the lengths it plans at once."""

from __future__ import annotations

import fake_kernels
from fake_kernels.third import FlashMLASchedMeta, enter
from mate import flashmla


def get_mla_metadata(*args, **kwargs):
    fake_kernels.CALLS["get_mla_metadata"] += 1
    meta = FlashMLASchedMeta()
    if args or kwargs:
        meta.tile_scheduler_metadata, meta.num_splits = flashmla.get_mla_metadata(*args, **kwargs)
    return meta, None


def flash_mla_with_kvcache(
    q,
    k_cache,
    block_table,
    cache_seqlens,
    head_dim_v,
    tile_scheduler_metadata,
    num_splits=None,
    softmax_scale=None,
    causal=False,
    is_fp8_kvcache=False,
    indices=None,
    attn_sink=None,
    extra_k_cache=None,
    extra_indices_in_kvcache=None,
    topk_length=None,
    extra_topk_length=None,
):
    fake_kernels.CALLS["flash_mla_with_kvcache"] += 1
    meta = tile_scheduler_metadata
    enter(meta, num_splits, q, k_cache, causal)
    if meta.tile_scheduler_metadata is None:
        rows = q.shape[1] * q.shape[2] // k_cache.shape[2]
        planned = flashmla.get_mla_metadata(cache_seqlens, rows, k_cache.shape[2], q.shape[2])
        meta.tile_scheduler_metadata, meta.num_splits = planned
    return flashmla.flash_mla_with_kvcache(
        q=q,
        k_cache=k_cache,
        block_table=block_table,
        cache_seqlens=cache_seqlens,
        head_dim_v=head_dim_v,
        tile_scheduler_metadata=meta.tile_scheduler_metadata,
        num_splits=meta.num_splits,
        softmax_scale=softmax_scale,
        causal=causal,
        is_fp8_kvcache=is_fp8_kvcache,
        indices=indices,
        attn_sink=attn_sink,
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices_in_kvcache,
        topk_length=topk_length,
        extra_topk_length=extra_topk_length,
    )
