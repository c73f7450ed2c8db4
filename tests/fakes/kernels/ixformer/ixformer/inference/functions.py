"""ixformer as newer vLLM forks call it: it can return the log-sum-exp."""

from __future__ import annotations

from fake_kernels.iluvatar import paged_attention_mla


def vllm_paged_attention_mla(
    output,
    query,
    kv_cache,
    scale,
    block_tables,
    context_lens,
    max_context_len,
    use_cuda_graph=False,
    return_softmax_lse=False,
):
    tables = (block_tables, context_lens, max_context_len)
    lse = paged_attention_mla(output, query, kv_cache, scale, *tables)
    return (output, lse) if return_softmax_lse else output
