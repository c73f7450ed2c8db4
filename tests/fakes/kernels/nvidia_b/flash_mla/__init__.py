"""FlashMLA of its second generation (September 2025): sparse attention and fp8 caches are asked for here."""

from __future__ import annotations

import fake_kernels
import torch
from fake_kernels import check

MULTIPROCESSORS = 132


def get_mla_metadata(
    cache_seqlens, num_q_tokens_per_head_k, num_heads_k, num_heads_q=None, is_fp8_kvcache=False, topk=None
):
    fake_kernels.CALLS["get_mla_metadata"] += 1
    check(not is_fp8_kvcache and topk is None, "the fake is dense")
    parts = max(1, MULTIPROCESSORS // num_heads_k // -(-num_q_tokens_per_head_k // 64))
    return fake_kernels.schedule(cache_seqlens, num_q_tokens_per_head_k * num_heads_k, parts)


def flash_mla_with_kvcache(
    q,
    k_cache,
    block_table,
    cache_seqlens,
    head_dim_v,
    tile_scheduler_metadata,
    num_splits,
    softmax_scale=None,
    causal=False,
    is_fp8_kvcache=False,
    indices=None,
):
    fake_kernels.CALLS["flash_mla_with_kvcache"] += 1
    check(not is_fp8_kvcache and indices is None, "the fake is dense")
    check(fake_kernels.CAPABILITY["flash_mla"] == (9, 0), "Dense decode MLA is only supported on SM90a")
    arguments = (q, k_cache, block_table, cache_seqlens, head_dim_v)
    fake_kernels.check_decode(*arguments, dtypes=(torch.bfloat16, torch.float16))
    fake_kernels.check_schedule(tile_scheduler_metadata, num_splits, cache_seqlens, q.shape[1] * q.shape[2])
    return fake_kernels.decode(*arguments, softmax_scale, causal)
