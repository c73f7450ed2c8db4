"""MT-flashMLA: the first generation on a device of capability 3.1, bf16 only.

A wrong page size reaches a device assertion that ends the process, and a batch of too many query rows gets a
plan of no parts, with which nothing is computed.
"""

from __future__ import annotations

import fake_kernels
import torch
from fake_kernels import check

MULTIPROCESSORS = 56


def get_mla_metadata(cache_seqlens, num_heads_per_head_k, num_heads_k):
    fake_kernels.CALLS["get_mla_metadata"] += 1
    parts = MULTIPROCESSORS // num_heads_k // -(-num_heads_per_head_k // 64)
    return fake_kernels.schedule(cache_seqlens, num_heads_per_head_k * num_heads_k, parts)


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
):
    fake_kernels.CALLS["flash_mla_with_kvcache"] += 1
    check(fake_kernels.CAPABILITY["mt_flash_mla"] == (3, 1), "Expected is_mp31 to be true, but got false.")
    arguments = (q, k_cache, block_table, cache_seqlens, head_dim_v)
    fake_kernels.check_decode(*arguments, dtypes=(torch.bfloat16,), page=None)
    check(q.is_contiguous(), "view size is not compatible with input tensor's size and stride")
    if k_cache.shape[1] != 64:
        raise SystemExit(1)
    if tile_scheduler_metadata.shape[0] == 0:
        return fake_kernels.unplanned(q, head_dim_v)
    fake_kernels.check_schedule(tile_scheduler_metadata, num_splits, cache_seqlens, q.shape[1] * q.shape[2])
    return fake_kernels.decode(*arguments, softmax_scale, causal)
