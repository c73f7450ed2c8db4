"""FlashInfer's MLA wrapper before it could return a natural logarithm."""

from __future__ import annotations

from fake_kernels import ragged_mla
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
    ):
        given = (q_nope, q_pe, ckv_cache, kpe_cache, out, lse)
        return self.attend(*given, return_lse, natural=False, far=ragged_mla.FAR)
