"""ixformer as older vLLM forks call it: it returns its output only."""

from __future__ import annotations

from fake_kernels.iluvatar import paged_attention_mla


def vllm_paged_attention_mla(
    output, query, kv_cache, scale, block_tables, context_lens, max_context_len, use_cuda_graph=False
):
    tables = (block_tables, context_lens, max_context_len)
    paged_attention_mla(output, query, kv_cache, scale, *tables)
    return output
