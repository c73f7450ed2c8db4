"""Fused ops of sparse attention over the compiled kernels: index keys, the selection, attention to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mla_backend_cpu.native_ops import (
    NativeLatentAttention,
    NativeOp,
    check,
    finish,
    output,
    pages,
    require_sizes,
    rows,
    threads,
)

if TYPE_CHECKING:
    import torch

    from mla_backends.api import IndexerSpec

SCALE_BYTES = 4  # of a token, behind the codes of its page


class _IndexOp(NativeOp):
    """What ops of the index cache share. Its format "fp8" is codes of a page, and then its scales.

    Keys are bfloat16, [pages, page, D] with D a multiple of 16, or bytes [pages, page, D + 4] uint8.
    """

    cache_formats = ("fp8",)
    multiples: Mapping[str, int] = {"index_head_dim": 16}

    def misfits(self, spec: IndexerSpec) -> list[str]:
        return self.misfitting(spec.head_dim)

    def _pages(self, cache: Any, width: int, cache_format: str) -> tuple[torch.Tensor, bool]:
        """Return the index cache, and whether it holds codes. Raises ValueError for another format."""
        if cache_format not in ("", *self.cache_formats):
            raise ValueError(f"the native ops do not know the index format '{cache_format}'.")
        coded = bool(cache_format)
        return pages(self.kernels, cache, coded, width + SCALE_BYTES if coded else width), coded


class NativeWriteIndexKey(_IndexOp):
    """LayerNorm with bias, rotate the first channels, scatter to the index cache, as codes if it has them.

    All of it is in fp32, and rounded to bfloat16 once, before a key is encoded. Raises ValueError for
    operands that do not fit.
    """

    contract = "write_index_key/1"
    encodes_rounded = True

    def misfits(self, spec: IndexerSpec) -> list[str]:
        return super().misfits(spec) + self._uneven(spec.head_dim, spec.rope_head_dim)

    @staticmethod
    def _uneven(width: int, rotary: int) -> list[str]:
        fits = rotary % 2 == 0 and 0 <= rotary <= width
        return [] if fits else [f"{rotary} rotated channels are odd, or more than index_head_dim {width}"]

    def __call__(
        self, *, k: Any, weight: Any, bias: Any, eps: float, cos_sin: Any, interleaved: bool, slots: Any,
        cache: Any, cache_format: str = "",
    ) -> None:  # fmt: skip
        """Write keys; operands are those of `write_index_key/1`."""
        import torch

        k = rows("k", k, torch.bfloat16, None, None)
        tokens, width = k.shape
        weight = rows("weight", weight, torch.bfloat16, width)
        bias = rows("bias", bias, torch.bfloat16, width)
        cos_sin = rows("cos_sin", cos_sin, torch.float32, tokens, None)
        require_sizes(*self.misfitting(width), *self._uneven(width, cos_sin.shape[1]))
        slots = rows("slots", slots, torch.int64, tokens)
        cache, coded = self._pages(cache, width, cache_format)
        wrong = self.functions.mla_write_index_key(
            k.data_ptr(), k.stride(0), weight.data_ptr(), bias.data_ptr(), eps, cos_sin.data_ptr(),
            cos_sin.stride(0), slots.data_ptr(), cache.data_ptr(), *cache.shape[:2], coded, tokens, width,
            cos_sin.shape[1], interleaved, threads(),
        )  # fmt: skip
        check(wrong)


class NativeSelectLatents(_IndexOp):
    """Score the index keys block by block, and keep the best of each query; long requests are split.

    Products are of bfloat16, sums and scores fp32. The scores of a query are never all in memory: about twice
    `topk` candidates are. Raises ValueError for operands that do not fit.
    """

    contract = "select_latents/1"
    nan_safe_tail = True

    def __call__(
        self, state: None, *,
        q: torch.Tensor, weights: torch.Tensor,  # [T, H, D], [T, H] fp32
        cache: torch.Tensor,  # [pages, page, D], or bytes [pages, page, D + 4]
        block_table: torch.Tensor, kv_lens: torch.Tensor, cu_q: torch.Tensor,
        out: torch.Tensor,  # [T, topk] int32
        cache_format: str = "",
    ) -> None:  # fmt: skip
        import torch

        q = rows("q", q, torch.bfloat16, None, None, None)
        tokens, heads, width = q.shape
        require_sizes(*self.misfitting(width))
        weights = rows("weights", weights, torch.float32, tokens, heads)
        target = output("out", out, torch.int32, tokens, None)
        kv_lens = rows("kv_lens", kv_lens, torch.int32, None)
        requests = kv_lens.shape[0]
        cu_q = rows("cu_q", cu_q, torch.int32, requests + 1)
        table = rows("block_table", block_table, torch.int32, requests, None)
        cache, coded = self._pages(cache, width, cache_format)
        wrong = self.functions.mla_select_latents(
            q.data_ptr(), *q.stride()[:2], tokens, weights.data_ptr(), weights.stride(0), cache.data_ptr(),
            coded, *cache.shape[:2], table.data_ptr(), table.stride(0), table.shape[1], kv_lens.data_ptr(),
            cu_q.data_ptr(), requests, heads, width, target.data_ptr(), target.stride(0), target.shape[1],
            threads(),
        )  # fmt: skip
        finish(wrong, target, out)


class NativeSparseAttention(NativeLatentAttention):
    """Absorbed attention to the latents that each query selects."""

    contract = "sparse_latent_attention/1"

    def __call__(self, state: None, *, selection: torch.Tensor, **tensors: Any) -> None:  # type: ignore[override]
        """Attend to `selection` [T, k] int32; the other operands are those of `latent_attention/2`."""
        super().__call__(state, selection=selection, **tensors)
