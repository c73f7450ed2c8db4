"""mate: plans are two tensors, and the log-sum-exp is laid out token by token, against its documentation.

Sparse attention (mate/sparse_mla of 0.2.2) lays it out as documented. Its kernels are compiled without bounds
of heads: those of 64 or 128 alone stay within a token.
"""

from __future__ import annotations

import math

import fake_kernels
import torch
from fake_kernels import check, sparse

MULTIPROCESSORS = 56
TILE = 64


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
    if topk is not None:
        check(
            is_fp8_kvcache and num_heads_q is not None, "num_heads_q must be provided when topk is provided"
        )
        check(cache_seqlens is None and q is not None, "the fake counts the rows of q")
        return fake_kernels.schedule(q.new_full((len(q),), topk, dtype=torch.int32), num_heads_q, 1)
    check(not is_fp8_kvcache, "the fake is dense, or sparse over bytes")
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
    check(attn_sink is None and topk_length is None, "the fake has neither sinks nor lengths")
    if indices is not None:
        assert not causal, "causal must be `false` if sparse attention is enabled."
        assert is_fp8_kvcache, "sparse mla decode only support fp8 kvcache"
        assert k_cache.dtype in (torch.uint8, torch.int8, torch.float8_e4m3fn), "k_cache must be uint8"
        assert k_cache.shape[2:] == (1, sparse.TOKEN), "dim_bytes == 656"
        topk = q.new_full((len(q),), indices.shape[2], dtype=torch.int32)
        fake_kernels.check_schedule(tile_scheduler_metadata, num_splits, topk, q.shape[2])
        given = q[:, 0], sparse.tokens(k_cache), indices[:, 0], softmax_scale or q.shape[-1] ** -0.5
        out, lse = selected(*given, k_cache.is_contiguous())
        return out[:, None], lse[:, :, None]
    check(not is_fp8_kvcache, "the fake is dense, or sparse over bytes")
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


def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None):
    fake_kernels.CALLS["mate.flash_mla_sparse_fwd"] += 1
    check(fake_kernels.CAPABILITY["mate"] == (3, 1), "mate needs MP31")
    check(attn_sink is None and topk_length is None, "the fake has neither sinks nor lengths")
    assert d_v == 512, "sparse prefill only supports d_v == 512"
    assert kv.dtype == torch.bfloat16, "kv must be bfloat16"
    assert kv.shape[1:] == (1, q.shape[-1]) == (1, 576)
    out, lse = selected(q, fake_kernels.host(kv)[:, 0], indices[:, 0], sm_scale, kv.is_contiguous())
    return out, torch.full_like(lse, math.nan), lse


def selected(q, rows, indices, scale, contiguous):
    """Return out [n, h, 512] and lse [n, h] of what both kernels check; an index of no row is no token."""
    assert q.dtype == torch.bfloat16, "q must be bfloat16"
    assert indices.dtype == torch.int32, "indices must be int32"
    assert all((q.is_contiguous(), contiguous, indices.is_contiguous()))
    message = "otherwise will load some index=0 thus causing wrong kv to be loaded"
    assert indices.shape[1] % TILE == 0, message
    out, lse = sparse.attend(q, rows, indices, scale, lambda chosen: (chosen >= 0) & (chosen < len(rows)))
    if q.shape[1] not in (64, 128):  # a block of 64 heads is written, over those of the next token
        out[:], lse[:] = math.nan, math.nan
    return fake_kernels.device_like(out, q, q.dtype), fake_kernels.device_like(lse, q, torch.float32)
