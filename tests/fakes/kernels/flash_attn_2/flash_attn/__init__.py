"""FlashAttention 2: values are as wide as keys."""

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
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    check(dropout_p == 0.0 and window_size == (-1, -1) and softcap == 0.0, "the fake has only the plain case")
    check(v.shape == k.shape, "v must have shape (total_k, num_heads_k, head_size)")
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = varlen(q, k, v, *lengths, softmax_scale, causal)
    return (out, lse, None) if return_attn_probs else out
