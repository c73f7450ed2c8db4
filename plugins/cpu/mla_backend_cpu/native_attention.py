"""Fused attention over the compiled kernels, absorbed and expanded."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mla_backend_cpu.native_ops import NativeOp, check, multiple, pages, rows, threads
from mla_backends.api import AttentionSpec, SegmentLengths

if TYPE_CHECKING:
    import torch


class NativeLatentAttention(NativeOp):
    """Absorbed attention straight from the pages; long requests are split over the threads."""

    contract = "latent_attention/1"
    nan_safe_tail = True

    def misfits(self, spec: AttentionSpec) -> list[str]:
        return [
            *multiple("kv_lora_rank", spec.kv_lora_rank, 32),
            *multiple("qk_rope_head_dim", spec.qk_rope_head_dim, 2),
        ]

    def __call__(
        self, state: None, *,
        q: torch.Tensor, cache: torch.Tensor,  # [T, h, c + r], [pages, page, c + r]
        block_table: torch.Tensor, kv_lens: torch.Tensor, cu_q: torch.Tensor,
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor,  # out [T, h, c], lse [T, h] fp32
    ) -> None:  # fmt: skip
        q, target, table, kv_lens, cu_q = rows(q), rows(out), rows(block_table), rows(kv_lens), rows(cu_q)
        wrong = self.functions.mla_latent_attention(
            q.data_ptr(), *q.stride()[:2], q.shape[0], pages(cache), cache.shape[0],
            table.data_ptr(), table.stride(0), table.shape[1], kv_lens.data_ptr(), cu_q.data_ptr(),
            kv_lens.shape[0], cache.shape[1], q.shape[1], q.shape[2], out.shape[2], softmax_scale,
            target.data_ptr(), *target.stride()[:2], lse.data_ptr(), *lse.stride(), threads(),
        )  # fmt: skip
        check(wrong)
        if target is not out:
            out.copy_(target)


@dataclass(frozen=True)
class _Segments:
    """Lengths in the layout that the kernel reads."""

    query_lens: array[int]
    kv_lens: array[int]
    causal: bool


class NativeExpandedAttention(NativeOp):
    """Ordinary multi-head attention over ragged segments."""

    contract = "expanded_attention/1"

    def misfits(self, spec: AttentionSpec) -> list[str]:
        return [
            *multiple("v_head_dim", spec.v_head_dim, 32),
            *multiple("qk_head_dim", spec.qk_nope_head_dim + spec.qk_rope_head_dim, 2),
        ]

    def prepare(self, spec: AttentionSpec, batch: SegmentLengths) -> _Segments:
        return _Segments(array("q", batch.query_lens), array("q", batch.kv_lens), batch.causal)

    def __call__(
        self, state: _Segments, *,
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,  # [Tq, h, n + r], [Tk, h, n + r], [Tk, h, v]
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor,  # out [Tq, h, v], lse [Tq, h] fp32
    ) -> None:  # fmt: skip
        q, k, v, target = rows(q), rows(k), rows(v), rows(out)
        (query_lens, segments), (kv_lens, _) = state.query_lens.buffer_info(), state.kv_lens.buffer_info()
        wrong = self.functions.mla_expanded_attention(
            q.data_ptr(), *q.stride()[:2], q.shape[0], k.data_ptr(), *k.stride()[:2], k.shape[0],
            v.data_ptr(), *v.stride()[:2], q.shape[1], q.shape[2], v.shape[2], softmax_scale,
            target.data_ptr(), *target.stride()[:2], lse.data_ptr(), *lse.stride(),
            query_lens, kv_lens, segments, state.causal, threads(),
        )  # fmt: skip
        check(wrong)
        if target is not out:
            out.copy_(target)
