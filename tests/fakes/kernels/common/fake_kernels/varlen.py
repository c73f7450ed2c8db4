"""FlashAttention over ragged segments."""

from __future__ import annotations

import torch

import fake_kernels
from fake_kernels import check


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
    """Return out [Tq, h, dv] in the dtype of q and lse [h, Tq] fp32; +inf and 0 where no key is seen."""
    fake_kernels.CALLS["flash_attn_varlen_func"] += 1
    check(q.dtype in (torch.bfloat16, torch.float16), "FlashAttention only support fp16 and bf16 data type")
    check(q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype")
    check(q.shape[2] == k.shape[2] and q.shape[2] <= 256, "head dimensions must match and be at most 256")
    check(k.shape[:2] == v.shape[:2], "k and v must have equal lengths")
    for tensor in (q, k, v):
        check(tensor.stride(-1) == 1, "Input tensor must have contiguous last dimension")
        odd = tensor.data_ptr() % 16 or any(stride % 8 for stride in tensor.stride()[:-1])
        check(tensor.shape[-1] % 8 or not odd, "CUDA error: misaligned address")
    for name, cu in {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}.items():
        check(cu.dtype == torch.int32 and cu.is_contiguous(), f"{name} must be contiguous int32")
    if type(max_seqlen_q) is not int or type(max_seqlen_k) is not int:
        raise TypeError("incompatible function arguments")
    check(max_seqlen_q > 0 and max_seqlen_k > 0, "CUDA error: invalid configuration argument")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q_bounds, k_bounds = fake_kernels.host(cu_seqlens_q).tolist(), fake_kernels.host(cu_seqlens_k).tolist()
    check(q_bounds[-1] == q.shape[0] and k_bounds[-1] <= k.shape[0], "cu_seqlens do not fit q and k")
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    lse = torch.full((q.shape[1], q.shape[0]), torch.inf, dtype=torch.float64)
    wide = [fake_kernels.host(tensor).double() for tensor in (q, k, v)]
    for i in range(len(q_bounds) - 1):
        queries, keys = q_bounds[i + 1] - q_bounds[i], k_bounds[i + 1] - k_bounds[i]
        check(queries <= max_seqlen_q and keys <= max_seqlen_k, "a segment is longer than the longest")
        for j in range(queries):
            seen = keys - (queries - 1 - j) if causal else keys
            if seen > 0:
                token, rows = q_bounds[i] + j, slice(k_bounds[i], k_bounds[i] + seen)
                logits = torch.einsum("hd,nhd->hn", wide[0][token], wide[1][rows]) * scale
                lse[:, token] = logits.logsumexp(-1)
                weights = (logits - lse[:, token, None]).exp()
                out[token] = torch.einsum("hn,nhd->hd", weights, wide[2][rows])
    return fake_kernels.device_like(out, q, q.dtype), fake_kernels.device_like(lse, q, torch.float32)
