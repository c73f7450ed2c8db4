"""FlashInfer's MLA wrapper since 0.7: what it deprecates is an error here, and bad batches are refused."""

from __future__ import annotations

import dataclasses
import functools
import math

import fake_kernels
import torch
from fake_kernels import check, ragged_mla, sparse
from fake_kernels.flat_wrapper import FlatWrapper


class _BackendPlanUnsupportedError(ValueError):
    pass


@dataclasses.dataclass(frozen=True)
class MLAPlanMetadata:
    qo_indptr: torch.Tensor | None = None
    kv_indptr: torch.Tensor | None = None
    kv_indices: torch.Tensor | None = None
    kv_len_arr: torch.Tensor | None = None
    cum_seq_lens_q: torch.Tensor | None = None
    block_tables: torch.Tensor | None = None
    seq_lens: torch.Tensor | None = None
    max_q_len: int | None = None

    @classmethod
    def csr(cls, qo_indptr, kv_indptr, kv_indices, kv_len_arr):
        return cls(qo_indptr, kv_indptr, kv_indices, kv_len_arr)


def keywords_only(method):
    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        if args:
            raise DeprecationWarning("Positional MLA arguments are deprecated")
        return method(self, **kwargs)

    return wrapped


class BatchMLAPagedAttentionWrapper(FlatWrapper):
    def __init__(
        self,
        float_workspace_buffer,
        use_cuda_graph=False,
        qo_indptr=None,
        kv_indptr=None,
        kv_indices=None,
        kv_len_arr=None,
        backend="auto",
    ):
        super().__init__(float_workspace_buffer, backend=backend)
        self._lse_mode = "none"

    @keywords_only
    def plan(
        self,
        qo_indptr=None,
        kv_indptr=None,
        kv_indices=None,
        kv_len_arr=None,
        num_heads=None,
        head_dim_ckv=None,
        head_dim_kpe=None,
        page_size=None,
        causal=None,
        sm_scale=None,
        q_data_type=None,
        kv_data_type=None,
        use_profiler=False,
        *,
        metadata=None,
        cum_seq_lens_q=None,
        block_tables=None,
        seq_lens=None,
        max_q_len=None,
        query_layout=None,
        kv_cache_layout=None,
        lse_mode="none",
        output_dtype=None,
        output_scale="none",
        scale_mode="default",
        skip_softmax=False,
        enable_pdl=None,
        use_sinks=False,
    ):
        fake_kernels.CALLS["plan"] += 1
        if metadata is None:
            raise DeprecationWarning("Passing flat BatchMLAPagedAttentionWrapper.plan metadata is deprecated")
        if (query_layout, kv_cache_layout) != ("split", "split"):
            raise _BackendPlanUnsupportedError("the fake has kernels for split inputs only")
        tables = (metadata.qo_indptr, metadata.kv_indptr, metadata.kv_indices, metadata.kv_len_arr)
        for table in tables:
            if table.dtype != torch.int32 or table.ndim != 1 or not table.is_contiguous():
                raise ValueError("metadata must be contiguous int32 of rank 1")
            if table.device.type != "cpu" and table.device != self.device:
                raise ValueError(f"metadata must be on CPU or wrapper device {self.device}")
        try:
            plan = ragged_mla.Plan(
                *tables,
                num_heads,
                head_dim_ckv,
                head_dim_kpe,
                page_size,
                causal,
                sm_scale,
                q_data_type,
                kv_data_type,
            )
        except RuntimeError as error:
            raise _BackendPlanUnsupportedError(str(error)) from error
        if any(lost for request in range(len(plan.lens)) for lost in plan.lost(request)):
            raise _BackendPlanUnsupportedError("fa3 MLA causal tile boundary is unsupported")
        e4m3 = kv_data_type == torch.float8_e4m3fn
        if (scale_mode == "kv-per-tensor") != e4m3:
            raise _BackendPlanUnsupportedError(
                "FP8 MLA plans, and no others, take scale_mode='kv-per-tensor'."
            )
        self._plan, self._lse_mode = plan, lse_mode

    @keywords_only
    def run(
        self,
        q_nope=None,
        q_pe=None,
        ckv_cache=None,
        kpe_cache=None,
        out=None,
        lse=None,
        return_lse=False,
        profiler_buffer=None,
        kv_len=None,
        page_table=None,
        return_lse_base_on_e=False,
        o_scale=None,
        *,
        query=None,
        kv_cache=None,
        ckv_scale=None,
        ckv_scale_arr=None,
        kpe_scale=None,
        sinks=None,
        skip_softmax_threshold_scale_factor=None,
        bmm1_scale=None,
        bmm2_scale=None,
    ):
        if query is None or kv_cache is None:
            raise DeprecationWarning("Legacy MLA tensor arguments are deprecated")
        if self._plan is None:
            raise RuntimeError("BatchMLAPagedAttentionWrapper.run() called before plan().")
        asked = "none"
        if return_lse or lse is not None or return_lse_base_on_e:
            asked = "basee" if return_lse_base_on_e else "base2"
        if asked != self._lse_mode:
            raise ValueError(f"LSE mode mismatch: planned {self._lse_mode!r}, got {asked!r}; re-plan")
        (q_nope, q_pe), (ckv_cache, kpe_cache) = query, kv_cache
        given = (ckv_scale, kpe_scale)
        if any((scale is None) == (ckv_cache.dtype == torch.float8_e4m3fn) for scale in given):
            raise ValueError("ckv_scale and kpe_scale are for FP8, which needs both")
        parts = (q_nope, q_pe, ckv_cache, kpe_cache, out, lse)
        return self.attend(*parts, return_lse, natural=asked == "basee", scales=given)


def trtllm_batch_decode_with_kv_cache_mla(
    query,
    kv_cache,
    workspace_buffer,
    qk_nope_head_dim,
    kv_lora_rank,
    qk_rope_head_dim,
    block_tables,
    seq_lens,
    max_seq_len,
    sparse_mla_top_k=0,
    out=None,
    bmm1_scale=1.0,
    bmm2_scale=1.0,
    sinks=None,
    skip_softmax_threshold_scale_factor=None,
    enable_pdl=None,
    backend="auto",
    is_var_seq=True,
    uses_shared_paged_kv_idx=True,
    lse=None,
    return_lse=False,
    cute_dsl_impl="auto",
    kv_scale_format="auto",
    cum_seq_lens_q=None,
    max_q_len=None,
    multi_ctas_kv_counter_buffer=None,
    sparse_mla_top_k_lens=None,
    enable_dcp=False,
    cp_world=1,
    cp_rank=0,
    causal_seqlens_kv_global=None,
    use_fp16_softmax=None,
    return_lse_base=None,
):
    """`trtllm-gen` over one-token pages (0.7.4): a row names its slots first, as many as `seq_lens` says.

    The log-sum-exp is to base 2 unless asked for otherwise. Nothing looks at what is behind the length.
    """
    fake_kernels.CALLS["trtllm_batch_decode_with_kv_cache_mla"] += 1
    check(fake_kernels.CAPABILITY["flashinfer sparse"] in ((10, 0), (10, 3)), "no kernel for this device")
    check(backend == "trtllm-gen" and sparse_mla_top_k > 0, "the fake has sparse kernels of trtllm-gen only")
    count, tokens, heads, width = query.shape
    if (kv_lora_rank, qk_rope_head_dim, width) != (512, 64, 576) or kv_cache.shape[-1] != 576:
        raise ValueError("Unsupported MLA dimensions")
    if kv_cache.shape[-2] not in (32, 64):
        raise ValueError(f"trtllm-gen requires block_size in (32, 64), got {kv_cache.shape[-2]}")
    if 64 < heads < 128:
        raise ValueError(f"trtllm-gen MLA decode does not support 64 < num_heads_q < 128; got {heads}")
    if block_tables.shape != (count, tokens, sparse_mla_top_k):
        raise ValueError(f"Expected page_table.shape == {(count, tokens, sparse_mla_top_k)}")
    check(tokens == 1, "the fake has rows of one token")
    check(sparse_mla_top_k % 4 == 0, "SparseMlaTopK must be a multiple of 4")
    check(query.dtype == kv_cache.dtype == torch.bfloat16, "the fake has bfloat16 only")
    check(block_tables.dtype == seq_lens.dtype == torch.int32, "tables and lengths must be int32")
    check(seq_lens.shape == (count,) and bmm2_scale == 1.0, "one length for each row")
    check(query.is_contiguous() and kv_cache.is_contiguous(), "nothing here is known to read strides")
    check(workspace_buffer.dtype == torch.uint8, "workspace_buffer must have bytes")
    rows = fake_kernels.host(kv_cache).reshape(-1, 576)
    lengths, names = fake_kernels.host(seq_lens), fake_kernels.host(block_tables)[:, 0]
    check(bool((lengths > 0).all()), "Zero-length rows are unsupported")
    named = torch.arange(names.shape[1]) < lengths[:, None].clamp_max(max_seq_len)
    check(bool(((names >= 0) & (names < len(rows)) | ~named).all()), sparse.IMA)
    value, sums = sparse.attend(
        query[:, 0], rows, names.masked_fill(~named, -1), bmm1_scale, lambda chosen: chosen >= 0
    )
    dirty = bool(fake_kernels.host(workspace_buffer)[:8].any())  # counters that were never zeroed
    value = fake_kernels.device_like(value * (math.nan if dirty else 1.0), query, query.dtype)[:, None]
    sums = sums if return_lse_base == "basee" else sums / math.log(2)
    return (value, fake_kernels.device_like(sums, query, torch.float32)) if return_lse else value
