"""FlashInfer's MLA wrapper before it could return a natural logarithm."""

from __future__ import annotations

import fake_kernels
import torch
from fake_kernels import ragged_mla


class BatchMLAPagedAttentionWrapper:
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
        fake_kernels.CALLS["BatchMLAPagedAttentionWrapper"] += 1
        if backend not in ("auto", "fa2", "fa3"):
            raise ValueError(f"backend {backend} is not covered by the fake")
        self.device = float_workspace_buffer.device
        self._plan = None

    def plan(
        self,
        qo_indptr,
        kv_indptr,
        kv_indices,
        kv_len_arr,
        num_heads,
        head_dim_ckv,
        head_dim_kpe,
        page_size,
        causal,
        sm_scale,
        q_data_type,
        kv_data_type,
        use_profiler=False,
    ):
        fake_kernels.CALLS["plan"] += 1
        self._plan = ragged_mla.Plan(
            qo_indptr,
            kv_indptr,
            kv_indices,
            kv_len_arr,
            num_heads,
            head_dim_ckv,
            head_dim_kpe,
            page_size,
            causal,
            sm_scale,
            q_data_type,
            kv_data_type,
        )

    def run(
        self,
        q_nope,
        q_pe,
        ckv_cache,
        kpe_cache,
        out=None,
        lse=None,
        return_lse=False,
        profiler_buffer=None,
        kv_len=None,
        page_table=None,
    ):
        fake_kernels.CALLS["run"] += 1
        out = torch.empty_like(q_nope) if out is None else out
        ragged_mla.check_output(out, q_nope.shape, q_nope.dtype, "out")
        if return_lse:
            lse = q_nope.new_empty(q_nope.shape[:2], dtype=torch.float32) if lse is None else lse
            ragged_mla.check_output(lse, q_nope.shape[:2], torch.float32, "lse")
        sums = lse if return_lse else None
        ragged_mla.run(self._plan, q_nope, q_pe, ckv_cache, kpe_cache, out, sums, far=ragged_mla.FAR)
        if return_lse:
            ragged_mla.to_base_2(lse)
        return (out, lse) if return_lse else out
