"""Absorbed attention over pages: `flash_mla`, which three vendors ship, and Iluvatar's `ixformer`.

NVIDIA, MetaX and Moore Threads ship `flash_mla` in several generations, which differ in what plans a batch
(`get_mla_metadata`): two tensors, or an object that the first call fills and None. The adapter relies on
what it gets, never on a version, and passes keywords only.

FlashMLA removed dense decoding on 2026-09-30. The package `sgl-flash-mla` keeps it under the same module
name, for calls that ask for it with `use_legacy` (read in FlashMLA 9a7d253 and sgl-flash-mla 1.0.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mla_backends.kernels.paged import E4M3_QUERIES, LatentLimits, Launch, PagedLatentOp, Result
from mla_backends.kernels.vendor import KernelRefused, accepts, parameters

if TYPE_CHECKING:
    import torch

DECODE, PLAN = "flash_mla_with_kvcache", "get_mla_metadata"
# The library's names -> ours: of a `Launch`, or of a plan.
ARGUMENTS = {
    "q": "q", "k_cache": "pages", "block_table": "block_table", "cache_seqlens": "kv_lens",
    "head_dim_v": "latent", "tile_scheduler_metadata": "metadata", "num_splits": "splits",
    "softmax_scale": "scale", "causal": True,
}  # fmt: skip
LEGACY = "use_legacy"
KEPT = "is in sgl-flash-mla, and in FlashMLA up to commit 9241ae3 of 2026-04-29"


class FlashMla(PagedLatentOp):
    """`flash_mla_with_kvcache` of any generation; `module` may be another that has the same functions.

    A plan belongs to one state, and so to the lengths of one batch: the kernel fills it in its first call and
    compares nothing later. Graphs: every replay plans for the current lengths, because planning is captured:
    once where the batch is planned inside the graph, else with every call. Capture batches of one query
    length; `RaggedBatch.update_()` then reaches the kernel.
    """

    module = "flash_mla"
    needs: Mapping[str, Mapping[str, Any]] = {DECODE: ARGUMENTS, PLAN: {}}
    limits = LatentLimits()
    tried = True
    refused_formats = E4M3_QUERIES
    of_v41 = f"has sparse attention only: dense decoding {KEPT}"  # a release since 2026-09-30

    def interface_reasons(self) -> list[str]:
        decode = self._vendor.flash_mla_with_kvcache
        known = parameters(decode) or {}
        if LEGACY in known or known.get("is_fp8_kvcache") is not True:
            return []
        return [self._vendor.with_hint(f"this {self._vendor.name} {self.of_v41}")]

    def _asks(self, function: str, **wanted: bool) -> dict[str, bool]:
        """Return what asks for dense attention where it is not the default, and the function takes it."""
        target = getattr(self._vendor, function)
        return {name: on for name, on in wanted.items() if accepts(target, LEGACY) and accepts(target, name)}

    def plan(self, kv_lens: torch.Tensor, query_rows: int) -> Any:
        """Return the scheduler metadata and the splits: for one batch, whose layers share them."""
        return self._vendor.get_mla_metadata(kv_lens, query_rows, 1, **self._asks(PLAN, use_legacy=True))

    def launch(self, plan: Any, call: Launch) -> Result:
        metadata, splits = plan
        more = {"pages": call.cache.unsqueeze(2), "metadata": metadata, "splits": splits}
        asks = self._asks(DECODE, use_legacy=True, is_fp8_kvcache=False)
        out, lse = self._call(DECODE, call, more, **asks)
        return out, lse


# ----------------------------------------------------------------------------------------- ixformer
# Iluvatar's `ixformer.inference.functions`: absorbed attention of one query token per row.
#
# A request with several new tokens becomes one row per token, each with its own length and the request's
# block table; there is no mask to pass. Such rows read the request's keys once per token, unlike one row of
# many.

IXFORMER = "vllm_paged_attention_mla"
IXFORMER_ARGUMENTS = {
    "output": "rows", "query": "queries", "kv_cache": "cache", "scale": "scale",
    "block_tables": "block_table", "context_lens": "kv_lens", "max_context_len": "longest",
}  # fmt: skip
LSE, GRAPH = "return_softmax_lse", "use_cuda_graph"


class IxformerMla(PagedLatentOp):
    """`vllm_paged_attention_mla`. Releases without a log-sum-exp leave NaN in `lse`: `writes_lse` is False.

    Graphs: the host's upper bound of the lengths is the block table's capacity, so replays may grow into it.
    """

    module = "ixformer.inference.functions"
    needs: Mapping[str, Mapping[str, Any]] = {IXFORMER: IXFORMER_ARGUMENTS}
    # What rows without keys give, and which pages are too small, is not known for this closed library.
    limits = LatentLimits(page_sizes=None, max_queries=1, empty_rows=False, lse_layout="tokens_first")
    refused_formats: Mapping[str, str] = {
        "int8": "its kernel takes codes and scales as two tensors, and this format is one"
    }

    def __init__(self, limits: LatentLimits | None = None, **named: str) -> None:
        """Take the kernel's limits; regardless of them, a row holds one query token."""
        super().__init__(replace(limits or self.limits, max_queries=1), **named)

    @property
    def writes_lse(self) -> bool:  # type: ignore[override]
        return not self._vendor.reasons() and accepts(getattr(self._vendor, IXFORMER), LSE)

    def launch(self, plan: Any, call: Launch) -> Result:
        if not call.cache.is_contiguous():
            raise KernelRefused("ixformer reads a contiguous latent cache only, and this one is a slice.")
        function, wanted = getattr(self._vendor, IXFORMER), (LSE, GRAPH) if call.captured else (LSE,)
        options = {name: True for name in wanted if accepts(function, name)}
        rows, _, heads, _ = call.q.shape
        out = call.out
        if out is None:
            out = self._scratch.take("out", (rows, 1, heads, call.latent), call.q, fresh=call.captured)
        more = {"rows": out[:, 0], "queries": call.q[:, 0]}
        result = self._call(IXFORMER, call, more, **options)
        return out, result[1][:, None] if LSE in options else None
