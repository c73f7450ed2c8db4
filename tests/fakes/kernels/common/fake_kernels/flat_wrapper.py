"""FlashInfer's MLA wrapper before 0.7: planned from flat tables, and given its tensors one by one."""

import torch

import fake_kernels
from fake_kernels import ragged_mla


class FlatWrapper:
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
        tables = (qo_indptr, kv_indptr, kv_indices, kv_len_arr)
        sizes = (num_heads, head_dim_ckv, head_dim_kpe, page_size, causal, sm_scale)
        self._plan = ragged_mla.Plan(*tables, *sizes, q_data_type, kv_data_type)

    def attend(self, q_nope, q_pe, ckv_cache, kpe_cache, out, lse, return_lse, natural, **more):
        """Run as planned; return out, and with `return_lse` the log-sum-exp, to base 2 unless `natural`."""
        fake_kernels.CALLS["run"] += 1
        out = torch.empty_like(q_nope) if out is None else out
        ragged_mla.check_output(out, q_nope.shape, q_nope.dtype, "out")
        if return_lse:
            lse = q_nope.new_empty(q_nope.shape[:2], dtype=torch.float32) if lse is None else lse
            ragged_mla.check_output(lse, q_nope.shape[:2], torch.float32, "lse")
        sums = lse if return_lse else None
        ragged_mla.run(self._plan, q_nope, q_pe, ckv_cache, kpe_cache, out, sums, **more)
        if return_lse and not natural:
            ragged_mla.to_base_2(lse)
        return (out, lse) if return_lse else out
