"""Absorbed attention to selected tokens: kernels for DeepSeek-V3.2 of FlashMLA, MATE and FlashInfer.

All take slots of the cache and no block table, a multiple of a tile of them, and a row for every new token.
FlashMLA has two kernels: over bytes of `fp8_ds_mla` (`flash_mla_with_kvcache` with `indices`), and over a
bf16 cache (`flash_mla_sparse_fwd`). Since 2026-09-30 it reads formats of V4.1 alone; sgl-flash-mla keeps the
others for calls with `use_legacy` (read in FlashMLA 9241ae3 and sgl-flash-mla 1.0.0). MATE has both
functions, planned as its dense ones (0.2.2, 3f58cc3). FlashInfer's is for bf16 caches on Blackwell (0.7.4).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mla_backends.api import OPS, AttentionSpec, BatchView
from mla_backends.kernels.latent import DECODE, KEPT, PLAN, FlashMla
from mla_backends.kernels.paged import E4M3_QUERIES, LatentLimits, Launch, PagedLatentOp, Result
from mla_backends.kernels.vendor import KernelRefused, VendorModule, accepts, capturing, missing
from mla_backends.slots import selected_slots

if TYPE_CHECKING:
    import torch

PREFILL = "flash_mla_sparse_fwd"
DECODE_ARGUMENTS = (
    "q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata", "num_splits",
    "softmax_scale", "causal", "is_fp8_kvcache", "indices",
)  # fmt: skip
PREFILL_ARGUMENTS = ("q", "kv", "indices", "sm_scale", "d_v")
# Of planners that are told shapes; others make an object that the first call fills.
PLAN_ARGUMENTS = (
    "cache_seqlens", "num_q_tokens_per_head_k", "num_heads_k", "num_heads_q", "is_fp8_kvcache", "topk", "q",
)  # fmt: skip
HEADS = (64, 128)
TILE = 128  # selected tokens: what Blackwell takes with 128 heads; elsewhere it is 64
# Pages of bytes as deployed: FlashMLA's own tests go from 2 to 576 tokens.
LIMITS = LatentLimits(dtypes=("bfloat16",), heads=HEADS, pads_heads_to=HEADS)


@dataclass(frozen=True)
class SparseState:
    """A planned batch. Nothing depends on its lengths, so that a captured call follows them."""

    spec: AttentionSpec
    heads: int  # what the kernel is given, padding included
    graph_safe: bool
    plans: dict[int, Any] = field(default_factory=dict)  # the vendor's, by the width of a selection


class SparseLatentOp(PagedLatentOp):
    """Base of adapters whose kernel takes a row for each new token, and slots. Subclasses attend.

    `most_bytes`: of a cache that the kernel finds its way in; None: any.
    """

    contract = OPS["sparse_latent_attention"]
    nan_safe_tail = True
    most_bytes: int | None = None

    def unsupported_batch(
        self, spec: Any, query_lens: Any, kv_lens: Any, page_size: int | None = None
    ) -> list[str]:
        return self.limits.page_reasons(page_size) if self.pages_matter(spec) else []

    def pages_matter(self, spec: AttentionSpec) -> bool:
        """Return whether the kernel is told pages, and not rows alone."""
        return True

    def prepare(self, spec: AttentionSpec, batch: BatchView) -> SparseState:  # type: ignore[override]
        """Plan the batch."""
        return SparseState(spec, self.limits.padded_heads(spec.num_heads) or 0, self.limits.graph)

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
        self._check_cache(cache)
        if captured := capturing(q.device):
            self._check_capture(state)  # type: ignore[arg-type]
        slots = selected_slots(selection, block_table, cu_q, cache.shape[1])
        topk, heads = slots.shape[1], q.shape[1]
        indices = slots.new_full((len(q), -(-topk // TILE) * TILE), -1, dtype=selection.dtype)
        indices[:, :topk] = slots
        queries = self._rows(q, state.heads, captured)
        call = Launch(
            queries, cache, indices, kv_lens, longest=indices.shape[1], scale=float(softmax_scale),
            latent=out.shape[2], out=None, captured=captured, with_lse=lse is not None,
        )  # fmt: skip
        value, sums = self.launch(state, call)
        nothing = slots[:, :1] < 0  # -1 is behind the others
        out.copy_(value[:, :heads])
        if not self.limits.empty_rows:
            out.masked_fill_(nothing[..., None], 0)
        if lse is not None and sums is not None:  # of such rows, kernels give +inf, or nothing that is known
            lse.copy_(sums.reshape(len(q), -1)[:, :heads].masked_fill(nothing, -math.inf))

    @abstractmethod
    def launch(self, plan: SparseState, call: Launch) -> Result:
        """Run the kernel for q [T, h, c + r]; `block_table` has slots, a multiple of TILE, and -1 for none.

        Returns out [T, h, c], and the natural log-sum-exp [T, h] or with an axis of 1.
        """

    def _check_cache(self, cache: torch.Tensor) -> None:
        """Raise `KernelRefused` for a cache in which the kernel would lose its way."""
        size = cache.numel() * cache.element_size()
        if self.most_bytes is not None and size > self.most_bytes:
            raise KernelRefused(
                f"{self._vendor.name} reads caches of at most {self.most_bytes >> 20} MiB, and this one has "
                f"{size >> 20}: give the cache fewer pages, or use other ops (`--ops reference`)."
            )

    def _rows(self, q: torch.Tensor, heads: int, captured: bool) -> torch.Tensor:
        """Return the queries [T, heads, c + r] without gaps; padding heads are zero."""
        if heads == q.shape[1] and q.is_contiguous() and q.data_ptr() % 16 == 0:
            return q
        wide = self._scratch.take(f"q{q.shape[1]}", (len(q), heads, q.shape[2]), q, fresh=captured)
        wide[:, : q.shape[1]].copy_(q)
        return wide


# ----------------------------------------------------------------------------------- FlashMLA and MATE
class FlashMlaSparse(SparseLatentOp, FlashMla):
    """`flash_mla`'s sparse attention, or that of a `module` with the same functions."""

    cache_formats = ("fp8_ds_mla",)
    refused_formats: Mapping[str, str] = {
        "fp8_ds_mla_any": "its kernels round decoded latents to bfloat16, or cut scales to powers of two"
    }

    needs: Mapping[str, tuple[str, ...]] = {DECODE: DECODE_ARGUMENTS, PREFILL: PREFILL_ARGUMENTS, PLAN: ()}
    of_v41 = f"reads caches of DeepSeek-V4.1 only: what reads latents of 576 {KEPT}"

    def __init__(self, limits: LatentLimits = LIMITS, *, most_bytes: int | None = None, **named: str) -> None:
        """Take the kernels' limits on a vendor's devices, and how to get the module: see `FlashMla`."""
        super().__init__(limits, **named)
        self.most_bytes = most_bytes

    def pages_matter(self, spec: AttentionSpec) -> bool:
        return bool(spec.cache_format)

    def interface_reasons(self) -> list[str]:
        plan = self._vendor.get_mla_metadata
        wanted = PLAN_ARGUMENTS if accepts(plan, "topk") else ()
        return super().interface_reasons() or missing(plan, f"{self._vendor.name}.{PLAN}", wanted)

    def launch(self, plan: SparseState, call: Launch) -> Result:
        if not plan.spec.cache_format:
            return self._of_numbers(call)
        width = call.longest
        if call.captured:  # a plan that lives as long as the graph
            return self._of_bytes(self._planned(call.q, width), call)
        if width not in plan.plans:
            plan.plans[width] = self._planned(call.q, width)
        return self._of_bytes(plan.plans[width], call)

    def _planned(self, q: torch.Tensor, width: int) -> Any:
        """Return the plan and splits of q [T, h, c + r]: of shapes alone, or an object that a call fills."""
        plan = self._vendor.get_mla_metadata
        if not accepts(plan, "topk"):
            return plan()
        heads = q.shape[1]
        shapes = {"num_q_tokens_per_head_k": heads, "num_heads_k": 1, "num_heads_q": heads, "topk": width}
        return plan(cache_seqlens=None, is_fp8_kvcache=True, q=q[:, None], **shapes)

    def _of_bytes(self, plan: Any, call: Launch) -> Result:
        """Attend over a cache [pages, page, 656] uint8."""
        metadata, splits = plan
        out, lse = self._vendor.flash_mla_with_kvcache(
            q=call.q[:, None],
            k_cache=call.cache.unsqueeze(2),
            block_table=None,
            cache_seqlens=None,
            head_dim_v=call.latent,
            tile_scheduler_metadata=metadata,
            num_splits=splits,
            softmax_scale=call.scale,
            causal=False,
            is_fp8_kvcache=True,
            indices=call.block_table[:, None],
            **self._asks(DECODE, use_legacy=True),
        )
        return out[:, 0], lse

    def _of_numbers(self, call: Launch) -> Result:
        """Attend over a cache [pages, page, c + r] bf16."""
        out, _, lse = self._vendor.flash_mla_sparse_fwd(
            q=call.q,
            kv=call.cache.flatten(0, 1).unsqueeze(1),
            indices=call.block_table[:, None],
            sm_scale=call.scale,
            d_v=call.latent,
            **self._asks(PREFILL, use_legacy=True),
        )
        return out, lse


# ------------------------------------------------------------------------------------------ FlashInfer
TRTLLM = "trtllm_batch_decode_with_kv_cache_mla"
TRTLLM_ARGUMENTS = (
    "query", "kv_cache", "workspace_buffer", "qk_nope_head_dim", "kv_lora_rank", "qk_rope_head_dim",
    "block_tables", "seq_lens", "max_seq_len", "sparse_mla_top_k", "bmm1_scale", "bmm2_scale", "backend",
    "return_lse", "return_lse_base",
)  # fmt: skip
WORKSPACE_BYTES = 128 << 20  # as engines give it, zero when it is first used
# `trtllm-gen` on data-centre Blackwell. It takes no row of nothing, and from 65 heads on 128.
TRTLLM_LIMITS = LatentLimits(
    dtypes=("bfloat16",), page_sizes=(32, 64), max_heads=64, pads_heads_to=(128,), empty_rows=False
)
_ROUNDED = "its kernels for such bytes, on sm_120 and sm_121, round queries to e4m3"


class FlashInferSparse(SparseLatentOp):
    """`flashinfer`'s `trtllm-gen` decoding over one-token pages: lengths are how many slots a row names."""

    refused_formats: Mapping[str, str] = {
        **E4M3_QUERIES, "fp8_ds_mla": _ROUNDED, "fp8_ds_mla_any": _ROUNDED
    }  # fmt: skip

    def __init__(self, limits: LatentLimits = TRTLLM_LIMITS, *, install: str = "") -> None:
        """Take the kernel's limits on a vendor's devices, and how to get flashinfer."""
        super().__init__(VendorModule("flashinfer.mla", {TRTLLM: TRTLLM_ARGUMENTS}, install), limits)
        self.cure = install or "use other ops (`--ops reference`)"

    def launch(self, plan: SparseState, call: Launch) -> Result:
        import torch

        spec, indices, width = plan.spec, call.block_table, call.longest
        lengths = (indices >= 0).sum(1, dtype=torch.int32).clamp_min_(1)
        indices[:, 0].clamp_min_(0)  # of a row of nothing, whose result is overwritten
        workspace = self._scratch.take("workspace", (WORKSPACE_BYTES,), call.cache.view(torch.uint8))
        result = getattr(self._vendor, TRTLLM)(
            query=call.q[:, None],
            kv_cache=call.cache,
            workspace_buffer=workspace,
            qk_nope_head_dim=spec.qk_nope_head_dim,
            kv_lora_rank=spec.kv_lora_rank,
            qk_rope_head_dim=spec.qk_rope_head_dim,
            block_tables=indices[:, None],
            seq_lens=lengths,
            max_seq_len=width,
            sparse_mla_top_k=width,
            bmm1_scale=call.scale,
            bmm2_scale=1.0,
            backend="trtllm-gen",
            return_lse=call.with_lse,
            return_lse_base="basee",
        )
        out, lse = result if call.with_lse else (result, None)
        return out[:, 0], lse
