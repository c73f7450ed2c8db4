"""Fused attention over the compiled kernels, absorbed and expanded."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mla_backend_cpu.native_ops import NativeOp, check, multiple, require_sizes, threads
from mla_backend_cpu.operands import output, pages, rows, written
from mla_backends.api import AttentionSpec, SegmentLengths

if TYPE_CHECKING:
    import torch


class NativeLatentAttention(NativeOp):
    """Absorbed attention straight from the pages; long requests are split over the threads."""

    contract = "latent_attention/1"
    nan_safe_tail = True

    def misfits(self, spec: AttentionSpec) -> list[str]:
        return self._sizes(spec.kv_lora_rank, spec.qk_rope_head_dim)

    def _sizes(self, latent: int, rotary: int) -> list[str]:
        return [*multiple("kv_lora_rank", latent, 32), *multiple("qk_rope_head_dim", rotary, 2)]

    def __call__(
        self, state: None, *,
        q: torch.Tensor, cache: torch.Tensor,  # [T, h, c + r], [pages, page, c + r]
        block_table: torch.Tensor, kv_lens: torch.Tensor, cu_q: torch.Tensor,
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor,  # out [T, h, c], lse [T, h] fp32
    ) -> None:  # fmt: skip
        import torch

        q = rows("q", q, torch.bfloat16, None, None, None)
        tokens, heads, width = q.shape
        target = output("out", out, torch.bfloat16, tokens, heads, None)
        require_sizes(*self._sizes(out.shape[2], width - out.shape[2]))
        kv_lens = rows("kv_lens", kv_lens, torch.int32, None)
        requests = kv_lens.shape[0]
        cu_q = rows("cu_q", cu_q, torch.int32, requests + 1)
        table = rows("block_table", block_table, torch.int32, requests, None)
        cache, lse = pages(cache, width), written("lse", lse, torch.float32, tokens, heads)
        wrong = self.functions.mla_latent_attention(
            q.data_ptr(), *q.stride()[:2], tokens, cache.data_ptr(), cache.shape[0],
            table.data_ptr(), table.stride(0), table.shape[1], kv_lens.data_ptr(), cu_q.data_ptr(),
            requests, cache.shape[1], heads, width, out.shape[2], softmax_scale,
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
        return self._sizes(spec.v_head_dim, spec.qk_nope_head_dim + spec.qk_rope_head_dim)

    def _sizes(self, value: int, key: int) -> list[str]:
        return [*multiple("v_head_dim", value, 32), *multiple("qk_head_dim", key, 2)]

    def prepare(self, spec: AttentionSpec, batch: SegmentLengths) -> _Segments:
        if len(batch.query_lens) != len(batch.kv_lens):
            raise ValueError(f"{len(batch.query_lens)} query_lens and {len(batch.kv_lens)} kv_lens.")
        return _Segments(array("q", batch.query_lens), array("q", batch.kv_lens), batch.causal)

    def __call__(
        self, state: _Segments, *,
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,  # [Tq, h, n + r], [Tk, h, n + r], [Tk, h, v]
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor,  # out [Tq, h, v], lse [Tq, h] fp32
    ) -> None:  # fmt: skip
        import torch

        if not isinstance(state, _Segments):
            raise ValueError("state was not made by prepare() of NativeExpandedAttention.")
        q = rows("q", q, torch.bfloat16, None, None, None)
        tokens, heads, width = q.shape
        k = rows("k", k, torch.bfloat16, None, heads, width)
        v = rows("v", v, torch.bfloat16, k.shape[0], heads, None)
        require_sizes(*self._sizes(v.shape[2], width))
        target = output("out", out, torch.bfloat16, tokens, heads, v.shape[2])
        lse = written("lse", lse, torch.float32, tokens, heads)
        (query_lens, segments), (kv_lens, _) = state.query_lens.buffer_info(), state.kv_lens.buffer_info()
        wrong = self.functions.mla_expanded_attention(
            q.data_ptr(), *q.stride()[:2], tokens, k.data_ptr(), *k.stride()[:2], k.shape[0],
            v.data_ptr(), *v.stride()[:2], heads, width, v.shape[2], softmax_scale,
            target.data_ptr(), *target.stride()[:2], lse.data_ptr(), *lse.stride(),
            query_lens, kv_lens, segments, state.causal, threads(),
        )  # fmt: skip
        check(wrong)
        if target is not out:
            out.copy_(target)
