"""FlashInfer's MLA wrapper: its log-sum-exp is to base 2 unless asked otherwise."""

from __future__ import annotations

from fake_kernels.flat_wrapper import FlatWrapper


class BatchMLAPagedAttentionWrapper(FlatWrapper):
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
        return_lse_base_on_e=False,
    ):
        given = (q_nope, q_pe, ckv_cache, kpe_cache, out, lse)
        return self.attend(*given, return_lse, natural=return_lse_base_on_e)
