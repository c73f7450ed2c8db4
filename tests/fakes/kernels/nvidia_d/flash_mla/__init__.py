"""FlashMLA since 2026-09-30: sparse attention only, on SM100 and SM103.

From flash_mla/flash_mla_interface.py at commit 9a7d253: the third generation's signature is kept, so that
only a default (`is_fp8_kvcache`) and a new argument tell, and dense calls fail an assertion.
"""

from __future__ import annotations

import fake_kernels
from fake_kernels.third import FlashMLASchedMeta


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
    is_fp8_kvcache=True,
    indices=None,
    attn_sink=None,
    extra_k_cache=None,
    extra_indices_in_kvcache=None,
    topk_length=None,
    extra_topk_length=None,
    enable_batch_invariant=False,
):
    fake_kernels.CALLS["flash_mla_with_kvcache"] += 1
    meta = tile_scheduler_metadata
    assert isinstance(meta, FlashMLASchedMeta), "tile_scheduler_metadata must be of type FlashMLASchedMeta"
    assert num_splits is None, "num_splits must be None"
    assert indices is not None, "Sparse attention is required: `indices` must be provided"
    assert not causal, "causal must be False when sparse attention is enabled"
    assert is_fp8_kvcache, "only sparse attention with a quantized KV cache is supported"
    raise NotImplementedError("the fake has no sparse attention")


def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None):
    fake_kernels.CALLS["flash_mla_sparse_fwd"] += 1
    raise NotImplementedError("the fake has no sparse attention")
