"""mate: plans are two tensors, and the log-sum-exp is laid out token by token, against its documentation."""

from __future__ import annotations

import fake_kernels
import torch
from fake_kernels import check

MULTIPROCESSORS = 56


def get_mla_metadata(
    cache_seqlens,
    num_q_tokens_per_head_k,
    num_heads_k,
    num_heads_q=None,
    is_fp8_kvcache=False,
    topk=None,
    extra_topk=None,
    q=None,
    bs=None,
    topk_length=None,
    extra_topk_length=None,
):
    fake_kernels.CALLS["mate.get_mla_metadata"] += 1
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
    attn_sink=None,
    extra_k_cache=None,
    extra_indices_in_kvcache=None,
    topk_length=None,
    extra_topk_length=None,
):
    fake_kernels.CALLS["mate.flash_mla_with_kvcache"] += 1
    check(fake_kernels.CAPABILITY["mate"] == (3, 1), "mate needs MP31")
    check(not is_fp8_kvcache and indices is None and attn_sink is None, "the fake is dense")
    arguments = (q, k_cache, block_table, cache_seqlens, head_dim_v)
    fake_kernels.check_decode(*arguments, dtypes=(torch.bfloat16, torch.float16))
    check(q.shape[2] in (8, 16, 32, 64, 128), "the number of heads is not covered by the package's own tests")
    if q.shape[2] == 128:
        check(
            all(stride % 576 == 0 for stride in k_cache.stride()[:3]), "ckv strides must be multiples of 576"
        )
    check(bool((fake_kernels.host(cache_seqlens) > 0).all()), "nobody knows what a row without keys gives")
    fake_kernels.check_schedule(tile_scheduler_metadata, num_splits, cache_seqlens, q.shape[1] * q.shape[2])
    out, lse = fake_kernels.decode(*arguments, softmax_scale, causal)
    return out, lse.transpose(1, 2).contiguous()
