"""mate's FlashAttention: values narrower than keys in one pair of widths, the log-sum-exp heads first."""

from __future__ import annotations

import fake_kernels
from fake_kernels import check, varlen


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    learnable_sink=None,
    attention_chunk=0,
    softcap=0.0,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_softmax_lse=False,
    backend="auto",
    cp_world_size=1,
    cp_rank=0,
    cp_tot_seqused_k=None,
    out=None,
):
    check(fake_kernels.CAPABILITY["mate"] == (3, 1), "mate needs MP31")
    widths = (q.shape[2], v.shape[2])
    check(widths == (192, 128) or widths[0] == widths[1] <= 128, f"the fake has no kernel for {widths}")
    lengths = [fake_kernels.host(cu).diff() for cu in (cu_seqlens_q, cu_seqlens_k)]
    check(bool((lengths[0] <= lengths[1]).all()), "nobody knows what a row without keys gives")
    arguments = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)
    attended, lse = varlen.varlen(*arguments)
    return (attended, lse) if return_softmax_lse else attended
