"""mcFlashMLA: plans by either of two spellings, and pages may be of any power of two.

The arguments after `indices`, context parallelism among them, stand where FlashMLA's third generation has
others.
"""

from __future__ import annotations

import warnings

import fake_kernels
import torch
from fake_kernels import check

MULTIPROCESSORS = 104
NAMES = ("num_q_tokens_per_head_k", "num_heads_k", "num_heads_q", "is_fp8_kvcache", "topk")


def get_mla_metadata(cache_seqlens, *args, **kwargs):
    fake_kernels.CALLS["get_mla_metadata"] += 1
    if "num_heads_per_head_k" in kwargs:
        warnings.warn("Parameter 'num_heads_per_head_k' is deprecated.", DeprecationWarning, stacklevel=2)
        args = (kwargs.pop("num_heads_per_head_k"), *args)
    if len(args) > len(NAMES) or set(kwargs) - set(NAMES):
        raise TypeError("get_mla_metadata() got unexpected arguments")
    given = {**dict(zip(NAMES, args, strict=False)), **kwargs}
    if not {"num_q_tokens_per_head_k", "num_heads_k"} <= set(given):
        raise TypeError("get_mla_metadata() misses required arguments")
    check(not given.get("is_fp8_kvcache"), "FP8 KV Cache is not supported.")
    check(given.get("topk") is None, "the fake is dense")
    rows, heads = given["num_q_tokens_per_head_k"], given["num_heads_k"]
    tile = 64 if rows * heads >= 64 else 32 if rows * heads >= 32 else 16
    parts = max(1, MULTIPROCESSORS // heads // -(-rows // tile))
    return fake_kernels.schedule(cache_seqlens, rows * heads, parts)


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
    indices_all_valid_per_q=None,
    descale_q=None,
    descale_k=None,
    cp_world_size=1,
    cp_rank=0,
    cp_tot_seqlen_k=None,
):
    fake_kernels.CALLS["flash_mla_with_kvcache"] += 1
    check(not is_fp8_kvcache, "flash mla with kvcache api not support fp8 now")
    check(indices is None and descale_q is None and descale_k is None, "the fake is dense and has no fp8")
    check(cp_world_size == 1 and cp_rank == 0, "the fake runs on one device")
    arguments = (q, k_cache, block_table, cache_seqlens, head_dim_v)
    fake_kernels.check_decode(*arguments, dtypes=(torch.bfloat16, torch.float16), page=None)
    page = k_cache.shape[1]
    check(page & (page - 1) == 0, "page_block_size must be a power of 2")
    check(q.is_contiguous(), "view size is not compatible with input tensor's size and stride")
    fake_kernels.check_schedule(tile_scheduler_metadata, num_splits, cache_seqlens, q.shape[1] * q.shape[2])
    return fake_kernels.decode(*arguments, softmax_scale, causal)
