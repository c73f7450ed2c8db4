"""sgl-flash-mla 1.0.0 (wheel of 2026-11): FlashMLA of 2026-09-30, with what that dropped behind `use_legacy`.

From flash_mla_interface.py of the wheel: dense decoding needs `use_legacy=True`; its plan is made in the
first call, kept in the object, and compared with nothing later, neither shapes nor lengths. A later call
follows the splits of the first: here its results are then NaN. The binary has dense decoding for SM90a only.
"""

from __future__ import annotations

import fake_kernels
import torch
from fake_kernels import check, sparse
from fake_kernels.third import FlashMLASchedMeta, refuse

from flash_mla._loader import check_ops, has_legacy

__all__ = ["flash_mla_sparse_fwd", "flash_mla_with_kvcache", "get_mla_metadata", "has_legacy"]

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
    is_fp8_kvcache=None,
    indices=None,
    attn_sink=None,
    extra_k_cache=None,
    extra_indices_in_kvcache=None,
    topk_length=None,
    extra_topk_length=None,
    enable_batch_invariant=False,
    use_legacy=False,
    kv_format=None,
    descale_q=None,
    descale_k=None,
):
    fake_kernels.CALLS["flash_mla_with_kvcache"] += 1
    meta = tile_scheduler_metadata
    assert isinstance(meta, FlashMLASchedMeta), "tile_scheduler_metadata must be of type FlashMLASchedMeta"
    assert num_splits is None, "num_splits must be None"
    check_ops(use_legacy)
    if is_fp8_kvcache is None:
        is_fp8_kvcache = indices is not None
    if indices is not None:
        assert not causal, "causal must be False when sparse attention is enabled"
        assert is_fp8_kvcache, "only sparse attention with a quantized KV cache is supported"
        assert use_legacy, "the current kernels accept the V4.1 formats only"
        assert not enable_batch_invariant, "it only exists on the current kernels"
        refuse(attn_sink=attn_sink, extra_k_cache=extra_k_cache, topk_length=topk_length)
        return sparse.decode(meta, q, k_cache, indices, head_dim_v, softmax_scale)
    assert use_legacy, "Sparse attention is required: pass use_legacy=True to reach the dense kernels"
    assert kv_format is None, "kv_format does not apply to dense decoding"
    assert not is_fp8_kvcache, "dense fp8 decoding needs metadata from get_mla_decoding_metadata"
    assert descale_q is None, "descale_q applies to the dense fp8 path only"
    assert descale_k is None, "descale_k applies to the dense fp8 path only"
    check(fake_kernels.CAPABILITY["flash_mla"] == (9, 0), "Dense decode MLA is only supported on SM90a")
    arguments = (q, k_cache, block_table, cache_seqlens, head_dim_v)
    fake_kernels.check_decode(*arguments, dtypes=(torch.bfloat16, torch.float16))
    if planned(meta, cache_seqlens, q.shape[1] * q.shape[2]):
        return fake_kernels.decode(*arguments, softmax_scale, causal)
    return fake_kernels.unplanned(q, head_dim_v)


def planned(meta, lens, query_rows):
    """Fill an empty plan; return whether it is that of these lengths."""
    if meta.tile_scheduler_metadata is None:
        parts = max(1, MULTIPROCESSORS // -(-query_rows // 64))
        meta.tile_scheduler_metadata, meta.num_splits = fake_kernels.schedule(lens, query_rows, parts)
    plan = fake_kernels.host(meta.tile_scheduler_metadata)[0]
    return torch.equal(plan, fake_kernels.fingerprint(lens, query_rows))


def flash_mla_sparse_fwd(
    q,
    kv,
    indices,
    sm_scale,
    d_v=512,
    attn_sink=None,
    topk_length=None,
    use_legacy=False,
    return_log2_lse=None,
):
    fake_kernels.CALLS["flash_mla_sparse_fwd"] += 1
    check_ops(use_legacy)
    assert use_legacy, "the current kernels take d_qk 512 only"
    assert return_log2_lse is None, "the fake has natural logarithms only"
    refuse(attn_sink=attn_sink, topk_length=topk_length)
    return sparse.prefill(q, kv, indices, sm_scale, d_v)
