"""FlashAttention 3: other arguments in other places, and values of 128 beside keys of 192."""

from __future__ import annotations

from fake_kernels import check
from fake_kernels.varlen import varlen


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    check(seqused_q is None and seqused_k is None and qv is None, "the fake has only the plain case")
    check(v.shape[2] == k.shape[2] or (k.shape[2], v.shape[2]) == (192, 128), "unsupported head dimensions")
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = varlen(q, k, v, *lengths, softmax_scale, causal)
    return (out, lse) if return_attn_probs else out
