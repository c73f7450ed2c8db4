"""ixformer's paged attention over latents: one query per row, and a host bound that is believed."""

from __future__ import annotations

import torch

import fake_kernels
from fake_kernels import check


def paged_attention_mla(output, query, kv_cache, scale, block_tables, context_lens, max_context_len):
    """Write attention to `output` [n, h, c] and return the log-sum-exp [n, h] fp32."""
    fake_kernels.CALLS["vllm_paged_attention_mla"] += 1
    check(query.dim() == 3 and output.shape[:2] == query.shape[:2], "query must be (tokens, heads, width)")
    check(query.dtype in (torch.bfloat16, torch.float16), "query must be half or bfloat16")
    check(kv_cache.dtype == query.dtype == output.dtype, "dtypes must match")
    check(
        kv_cache.dim() == 3 and kv_cache.shape[2] == query.shape[2], "kv_cache must be (blocks, size, width)"
    )
    check((query.shape[2], output.shape[2]) == (576, 512), "only 512 + 64 is supported")
    for name, tensor in {"output": output, "query": query, "kv_cache": kv_cache}.items():
        check(tensor.is_contiguous(), f"{name} must be contiguous")
    fake_kernels.check_table("block_tables", block_tables, (query.shape[0], block_tables.shape[1]))
    fake_kernels.check_table("context_lens", context_lens, (query.shape[0],))
    if type(max_context_len) is not int or type(scale) is not float:
        raise TypeError("incompatible function arguments")
    check(bool((fake_kernels.host(context_lens) > 0).all()), "nobody knows what a row without keys gives")
    lens = fake_kernels.host(context_lens).clamp(max=max_context_len)
    out, lse = fake_kernels.paged(query[:, None], kv_cache, block_tables, lens, scale, False, 512)
    fake_kernels.host(output).copy_(out[:, 0])
    return fake_kernels.device_like(lse[:, 0], query, torch.float32)
