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
from mla_backends.kernels.vendor import KernelRefused, VendorModule, accepts, default

if TYPE_CHECKING:
    import torch

DECODE, PLAN = "flash_mla_with_kvcache", "get_mla_metadata"
ARGUMENTS = (
    "q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata", "num_splits",
    "softmax_scale", "causal",
)  # fmt: skip
LEGACY = "use_legacy"
KEPT = "is in sgl-flash-mla, and in FlashMLA up to commit 9241ae3 of 2026-04-29"


class FlashMla(PagedLatentOp):
    """`flash_mla_with_kvcache` of any generation; `module` may be another that has the same functions.

    A plan belongs to one state, and so to the lengths of one batch: the kernel fills it in its first call and
    compares nothing later. Graphs: every replay plans for the current lengths, because planning is captured:
    once where the batch is planned inside the graph, else with every call. Capture batches of one query
    length; `RaggedBatch.update_()` then reaches the kernel.
    """

    refused_formats = E4M3_QUERIES
    needs: Mapping[str, tuple[str, ...]] = {DECODE: ARGUMENTS, PLAN: ()}
    of_v41 = f"has sparse attention only: dense decoding {KEPT}"  # a release since 2026-09-30

    def __init__(
        self,
        limits: LatentLimits | None = None,
        *,
        module: str = "flash_mla",
        install: str = "",
        compiles: str = "",
        cure: str = "",
    ) -> None:
        """Take the kernel's limits on a vendor's devices, and how to get the module.

        `compiles` is what it compiles at first use, and `cure` what to do where that fails.
        """
        super().__init__(VendorModule(module, self.needs, install), limits or LatentLimits())
        self.compiles = compiles
        self.cure = cure or install or "use the reference ops (`--ops reference`)"

    def interface_reasons(self) -> list[str]:
        decode = self._vendor.flash_mla_with_kvcache
        if accepts(decode, LEGACY) or default(decode, "is_fp8_kvcache") is not True:
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
        out, lse = self._vendor.flash_mla_with_kvcache(
            q=call.q,
            k_cache=call.cache.unsqueeze(2),
            block_table=call.block_table,
            cache_seqlens=call.kv_lens,
            head_dim_v=call.latent,
            tile_scheduler_metadata=metadata,
            num_splits=splits,
            softmax_scale=call.scale,
            causal=True,
            **self._asks(DECODE, use_legacy=True, is_fp8_kvcache=False),
        )
        return out, lse


# ----------------------------------------------------------------------------------------- ixformer
# Iluvatar's `ixformer.inference.functions`: absorbed attention of one query token per row.
#
# A request with several new tokens becomes one row per token, each with its own length and the request's
# block table; there is no mask to pass. Such rows read the request's keys once per token, unlike one row of
# many.

IXFORMER = "vllm_paged_attention_mla"
IXFORMER_ARGUMENTS = (
    "output", "query", "kv_cache", "scale", "block_tables", "context_lens", "max_context_len",
)  # fmt: skip
LSE, GRAPH = "return_softmax_lse", "use_cuda_graph"
# What rows without keys give, and which pages are too small, is not known for this closed library.
IXFORMER_LIMITS = LatentLimits(page_sizes=None, max_queries=1, empty_rows=False, lse_layout="tokens_first")


class IxformerMla(PagedLatentOp):
    """`vllm_paged_attention_mla`. Releases without a log-sum-exp leave NaN in `lse`: `writes_lse` is False.

    Graphs: the host's upper bound of the lengths is the block table's capacity, so replays may grow into it.
    """

    refused_formats: Mapping[str, str] = {
        "int8": "its kernel takes codes and scales as two tensors, and this format is one"
    }

    def __init__(self, limits: LatentLimits = IXFORMER_LIMITS, *, install: str = "") -> None:
        """Take the kernel's limits; regardless of them, a row holds one query token."""
        vendor = VendorModule("ixformer.inference.functions", {IXFORMER: IXFORMER_ARGUMENTS}, install)
        super().__init__(vendor, replace(limits, max_queries=1))

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
        result = function(
            output=out[:, 0],
            query=call.q[:, 0],
            kv_cache=call.cache,
            scale=call.scale,
            block_tables=call.block_table,
            context_lens=call.kv_lens,
            max_context_len=call.longest,
            **options,
        )
        return out, result[1][:, None] if LSE in options else None
