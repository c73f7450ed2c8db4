"""FlashAttention 2 before 2.6: its log-sum-exp is padded, segment by segment."""

from __future__ import annotations

import fake_kernels
import torch
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
    bounds = fake_kernels.host(cu_seqlens_q).tolist()
    padded = torch.full((len(bounds) - 1, q.shape[1], max_seqlen_q), torch.inf)
    for i in range(len(bounds) - 1):
        padded[i, :, : bounds[i + 1] - bounds[i]] = fake_kernels.host(lse)[:, bounds[i] : bounds[i + 1]]
    lse = fake_kernels.device_like(padded, q)
    return (out, lse, None) if return_attn_probs else out
