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
from mla_backends.kernels.vendor import OTHER_OPS, KernelRefused, accepts, capturing
from mla_backends.slots import selected_slots

if TYPE_CHECKING:
    import torch

PREFILL = "flash_mla_sparse_fwd"
DECODE_ARGUMENTS = {
    "q": "rows", "k_cache": "pages", "block_table": None, "cache_seqlens": None, "head_dim_v": "latent",
    "tile_scheduler_metadata": "metadata", "num_splits": "splits", "softmax_scale": "scale",
    "causal": False, "is_fp8_kvcache": True, "indices": "slots",
}  # fmt: skip
PREFILL_ARGUMENTS = {"q": "q", "kv": "tokens", "indices": "slots", "sm_scale": "scale", "d_v": "latent"}
# Of planners that are told shapes; others make an object that the first call fills.
PLAN_ARGUMENTS = (
    "cache_seqlens", "num_q_tokens_per_head_k", "num_heads_k", "num_heads_q", "is_fp8_kvcache", "topk", "q",
)  # fmt: skip
HEADS = (64, 128)
TILE = 128  # selected tokens: what Blackwell takes with 128 heads; elsewhere it is 64


@dataclass(frozen=True)
class SparseState:
    """A planned batch. Nothing depends on its lengths, so that a captured call follows them."""

    spec: AttentionSpec
    heads: int  # what the kernel is given, padding included
    graph_safe: bool
    plans: dict[int, Any] = field(default_factory=dict)  # the vendor's, by the width of a selection


class SparseLatentOp(PagedLatentOp):
    """Base of adapters whose kernel takes a row for each new token, and slots. Subclasses attend."""

    contract = OPS["sparse_latent_attention"]
    nan_safe_tail = True

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
        size, most = cache.numel() * cache.element_size(), self.limits.max_bytes
        if most is not None and size > most:
            raise KernelRefused(
                f"{self._vendor.name} reads caches of at most {most >> 20} MiB, and this one has "
                f"{size >> 20}: give the cache fewer pages, or {OTHER_OPS}."
            )
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

    needs: Mapping[str, Mapping[str, Any]] = {DECODE: DECODE_ARGUMENTS, PREFILL: PREFILL_ARGUMENTS, PLAN: {}}
    # Pages of bytes as deployed: FlashMLA's own tests go from 2 to 576 tokens.
    limits = LatentLimits(dtypes=("bfloat16",), heads=HEADS, pads_heads_to=HEADS)
    of_v41 = f"reads caches of DeepSeek-V4.1 only: what reads latents of 576 {KEPT}"

    def pages_matter(self, spec: AttentionSpec) -> bool:
        return bool(spec.cache_format)

    def interface_reasons(self) -> list[str]:
        told = accepts(self._vendor.get_mla_metadata, "topk")
        wanted = {PLAN: PLAN_ARGUMENTS} if told else {}
        return super().interface_reasons() or self._vendor.differences(wanted)

    def launch(self, plan: SparseState, call: Launch) -> Result:
        if not plan.spec.cache_format:
            return self._of_numbers(call)
        width = call.longest
        plans = {} if call.captured else plan.plans  # what is captured lives as long as the graph
        if width not in plans:
            plans[width] = self._plan_of(call.q, width)
        return self._of_bytes(plans[width], call)

    def _plan_of(self, q: torch.Tensor, width: int) -> Any:
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
        more = {
            "rows": call.q[:, None], "pages": call.cache.unsqueeze(2), "slots": call.block_table[:, None],
            "metadata": metadata, "splits": splits,
        }  # fmt: skip
        out, lse = self._call(DECODE, call, more, **self._asks(DECODE, use_legacy=True))
        return out[:, 0], lse

    def _of_numbers(self, call: Launch) -> Result:
        """Attend over a cache [pages, page, c + r] bf16."""
        more = {"tokens": call.cache.flatten(0, 1).unsqueeze(1), "slots": call.block_table[:, None]}
        out, _, lse = self._call(PREFILL, call, more, **self._asks(PREFILL, use_legacy=True))
        return out, lse


# ------------------------------------------------------------------------------------------ FlashInfer
TRTLLM = "trtllm_batch_decode_with_kv_cache_mla"
TRTLLM_ARGUMENTS = {
    "query": "rows", "kv_cache": "cache", "workspace_buffer": "workspace",
    "qk_nope_head_dim": "qk_nope_head_dim", "kv_lora_rank": "kv_lora_rank",
    "qk_rope_head_dim": "qk_rope_head_dim", "block_tables": "slots", "seq_lens": "lengths",
    "max_seq_len": "longest", "sparse_mla_top_k": "longest", "bmm1_scale": "scale", "bmm2_scale": 1.0,
    "backend": "kernel", "return_lse": "with_lse", "return_lse_base": "base",
}  # fmt: skip
WORKSPACE_BYTES = 128 << 20  # as engines give it, zero when it is first used
_ROUNDED = "its kernels for such bytes, on sm_120 and sm_121, round queries to e4m3"


class FlashInferSparse(SparseLatentOp):
    """`flashinfer`'s `trtllm-gen` decoding over one-token pages: lengths are how many slots a row names."""

    module = "flashinfer.mla"
    needs: Mapping[str, Mapping[str, Any]] = {TRTLLM: TRTLLM_ARGUMENTS}
    # `trtllm-gen` on data-centre Blackwell. It takes no row of nothing, and from 65 heads on 128.
    limits = LatentLimits(
        dtypes=("bfloat16",), page_sizes=(32, 64), max_heads=64, pads_heads_to=(128,), empty_rows=False
    )
    tried = True
    refused_formats: Mapping[str, str] = {
        **E4M3_QUERIES, "fp8_ds_mla": _ROUNDED, "fp8_ds_mla_any": _ROUNDED
    }  # fmt: skip

    def launch(self, plan: SparseState, call: Launch) -> Result:
        import torch

        indices = call.block_table
        lengths = (indices >= 0).sum(1, dtype=torch.int32).clamp_min_(1)
        indices[:, 0].clamp_min_(0)  # of a row of nothing, whose result is overwritten
        workspace = self._scratch.take("workspace", (WORKSPACE_BYTES,), call.cache, dtype=torch.uint8)
        more = {
            **vars(plan.spec), "rows": call.q[:, None], "slots": indices[:, None], "lengths": lengths,
            "workspace": workspace, "kernel": "trtllm-gen", "base": "basee",
        }  # fmt: skip
        result = self._call(TRTLLM, call, more)
        out, lse = result if call.with_lse else (result, None)
        return out[:, 0], lse
