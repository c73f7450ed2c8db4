"""FlashMLA of its third generation (since January 2026). The first call of a plan fills it."""

from __future__ import annotations

import fake_kernels
import torch
from fake_kernels import check, sparse
from fake_kernels.third import FlashMLASchedMeta, enter, refuse

MULTIPROCESSORS = 132


def get_mla_metadata(*args, **kwargs):
    fake_kernels.CALLS["get_mla_metadata"] += 1
    return FlashMLASchedMeta(), None


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
    if indices is not None:
        assert num_splits is None, "num_splits must be None"
        assert not causal, "causal must be False when sparse attention is enabled"
        assert is_fp8_kvcache, "is_fp8_kvcache must be True with indices"
        refuse(attn_sink=attn_sink, extra_k_cache=extra_k_cache, topk_length=topk_length)
        return sparse.decode(meta, q, k_cache, indices, head_dim_v, softmax_scale)
    enter(meta, num_splits, q, k_cache, causal)
    refuse(is_fp8_kvcache=is_fp8_kvcache, indices=indices, attn_sink=attn_sink, extra_k_cache=extra_k_cache)
    refuse(
        extra_indices=extra_indices_in_kvcache, topk_length=topk_length, extra_topk_length=extra_topk_length
    )
    message = "Dense decode MLA is only supported on SM90a architecture"
    check(fake_kernels.CAPABILITY["flash_mla"] == (9, 0), message)
    arguments = (q, k_cache, block_table, cache_seqlens, head_dim_v)
    fake_kernels.check_decode(*arguments, dtypes=(torch.bfloat16, torch.float16), widths=(576, 512))
    query_rows = q.shape[1] * q.shape[2]
    if meta.tile_scheduler_metadata is None:
        parts = max(1, MULTIPROCESSORS // -(-query_rows // 64))
        meta.tile_scheduler_metadata, meta.num_splits = fake_kernels.schedule(
            cache_seqlens, query_rows, parts
        )
    fake_kernels.check_schedule(meta.tile_scheduler_metadata, meta.num_splits, cache_seqlens, query_rows)
    return fake_kernels.decode(*arguments, softmax_scale, causal)


def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None):
    fake_kernels.CALLS["flash_mla_sparse_fwd"] += 1
    refuse(attn_sink=attn_sink, topk_length=topk_length)
    return sparse.prefill(q, kv, indices, sm_scale, d_v)
