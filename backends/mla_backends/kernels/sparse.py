"""Absorbed attention to selected tokens: FlashMLA's kernels for DeepSeek-V3.2.

Two kernels share a package: over bytes of `fp8_ds_mla` (`flash_mla_with_kvcache` with `indices`), and over a
bf16 cache (`flash_mla_sparse_fwd`). Both take slots of the cache, a multiple of a tile of them, 64 or 128
heads, and queries without gaps. Since 2026-09-30 FlashMLA reads formats of V4.1 alone; sgl-flash-mla keeps
the others for calls with `use_legacy` (read in FlashMLA 9241ae3 and sgl-flash-mla 1.0.0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mla_backends.api import OPS, AttentionSpec, BatchView
from mla_backends.kernels.latent import LEGACY, FlashMla
from mla_backends.kernels.paged import LatentLimits
from mla_backends.kernels.vendor import KernelRefused, VendorModule, accepts, capturing, default, missing
from mla_backends.slots import selected_slots

if TYPE_CHECKING:
    import torch

DECODE, PREFILL = "flash_mla_with_kvcache", "flash_mla_sparse_fwd"
DECODE_ARGUMENTS = (
    "q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata", "num_splits",
    "softmax_scale", "causal", "is_fp8_kvcache", "indices",
)  # fmt: skip
PREFILL_ARGUMENTS = ("q", "kv", "indices", "sm_scale", "d_v")
KEPT = "kernels for latents of 576 are in sgl-flash-mla, and in FlashMLA up to commit 9241ae3 of 2026-04-29"
HEADS = (64, 128)
TILE = 128  # selected tokens: what Blackwell takes with 128 heads; elsewhere it is 64
MOST_SLOTS = 2**31  # that int32 names
# Pages of bytes as deployed: FlashMLA's own tests go from 2 to 576 tokens.
LIMITS = LatentLimits(dtypes=("bfloat16",), heads=HEADS, pads_heads_to=HEADS)


@dataclass(frozen=True)
class SparseState:
    """A planned batch. Nothing depends on its lengths, so that a captured call follows them."""

    heads: int  # what the kernel is given, padding included
    plan: Any  # the vendor's, which depends on shapes alone
    graph_safe: bool


class FlashMlaSparse(FlashMla):
    """`flash_mla`'s sparse attention: every new token is a row of its own."""

    contract = OPS["sparse_latent_attention"]
    cache_formats = ("fp8_ds_mla",)
    refused_formats: Mapping[str, str] = {
        "fp8_ds_mla_any": "its kernels for Blackwell cut scales to powers of two"
    }
    nan_safe_tail = True

    def __init__(self, limits: LatentLimits = LIMITS, *, install: str = "") -> None:
        """Take the kernels' limits on a vendor's devices, and how to get the module."""
        super().__init__(replace(limits, max_rows=None), install=install)
        self._vendor = VendorModule("flash_mla", ("get_mla_metadata", DECODE, PREFILL), install)

    def interface_reasons(self) -> list[str]:
        decode, prefill = (getattr(self._vendor, name) for name in (DECODE, PREFILL))
        legacy = accepts(decode, LEGACY)
        if not legacy and default(decode, "is_fp8_kvcache") is True:
            return [f"this {self._vendor.name} reads caches of DeepSeek-V4.1 only: {self._with_hint(KEPT)}"]
        reasons = missing(decode, f"{self._vendor.name}.{DECODE}", DECODE_ARGUMENTS)
        reasons += missing(prefill, f"{self._vendor.name}.{PREFILL}", PREFILL_ARGUMENTS)
        return reasons or (self._legacy_reasons() if legacy else [])

    def unsupported_batch(
        self, spec: Any, query_lens: Any, kv_lens: Any, page_size: int | None = None
    ) -> list[str]:
        return self.limits.page_reasons(page_size) if spec.cache_format else []

    def prepare(self, spec: AttentionSpec, batch: BatchView) -> SparseState:  # type: ignore[override]
        """Plan the batch. Raises `KernelRefused` for pages that the kernel cannot read."""
        if spec.cache_format:
            self.limits.check_page(batch.page_size)
        return SparseState(self.limits.padded_heads(spec.num_heads) or 0, self._plan(), self.limits.graph)

    def _plan(self) -> Any:
        return self._vendor.get_mla_metadata()[0]

    def __call__(  # type: ignore[override]
        self, state: SparseState, *,
        q: torch.Tensor, cache: torch.Tensor,  # [T, h, c + r], [pages, page, c + r] or bytes
        block_table: torch.Tensor, kv_lens: torch.Tensor, cu_q: torch.Tensor,
        selection: torch.Tensor,  # [T, topk] int32
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor | None,  # out [T, h, c], lse [T, h] fp32
        cache_format: str = "",
    ) -> None:  # fmt: skip
        if not len(q):
            return
        if cache.shape[0] * cache.shape[1] > MOST_SLOTS:
            raise KernelRefused(f"{self._vendor.name} names at most {MOST_SLOTS} tokens of a cache.")
        slots = selected_slots(selection, block_table, cu_q, cache.shape[1])
        captured, topk = capturing(q.device), slots.shape[1]
        indices = slots.new_full((len(q), -(-topk // TILE) * TILE), -1, dtype=slots.int().dtype)
        indices[:, :topk] = slots
        queries = self._rows(q, state.heads, captured)
        scale = float(softmax_scale)
        if cache_format:
            plan = self._plan() if captured else state.plan  # one that lives as long as the graph
            value, sums = self._of_bytes(plan, queries, cache, indices, scale)
        else:
            value, sums = self._of_numbers(queries, cache, indices, scale)
        heads = q.shape[1]
        out.copy_(value[:, :heads])
        if lse is not None:  # +inf where nothing is selected; the output is 0 there
            sums = sums[:, :heads]
            lse.copy_(sums.masked_fill(sums == math.inf, -math.inf))

    def _rows(self, q: torch.Tensor, heads: int, captured: bool) -> torch.Tensor:
        """Return the queries [T, heads, c + r] without gaps; padding heads are zero."""
        if heads == q.shape[1] and q.is_contiguous() and q.data_ptr() % 16 == 0:
            return q
        wide = self._scratch.take(f"q{q.shape[1]}", (len(q), heads, q.shape[2]), q, fresh=captured)
        wide[:, : q.shape[1]].copy_(q)
        return wide

    def _of_bytes(
        self, plan: Any, q: torch.Tensor, cache: torch.Tensor, indices: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out [T, heads, c] and lse [T, heads] over a cache [pages, page, 656] uint8."""
        out, lse = self._vendor.flash_mla_with_kvcache(
            q=q[:, None],
            k_cache=cache.unsqueeze(2),
            block_table=None,
            cache_seqlens=None,
            head_dim_v=512,
            tile_scheduler_metadata=plan,
            num_splits=None,
            softmax_scale=scale,
            causal=False,
            is_fp8_kvcache=True,
            indices=indices[:, None],
            **self._legacy_of(DECODE),
        )
        return out[:, 0], lse[:, :, 0]

    def _of_numbers(
        self, q: torch.Tensor, cache: torch.Tensor, indices: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out [T, heads, c] and lse [T, heads] over a cache [pages, page, c + r] bf16."""
        out, _, lse = self._vendor.flash_mla_sparse_fwd(
            q=q,
            kv=cache.flatten(0, 1).unsqueeze(1),
            indices=indices[:, None],
            sm_scale=scale,
            d_v=512,
            **self._legacy_of(PREFILL),
        )
        return out, lse

    def _legacy_of(self, function: str) -> dict[str, bool]:
        return {LEGACY: True} if accepts(getattr(self._vendor, function), LEGACY) else {}
