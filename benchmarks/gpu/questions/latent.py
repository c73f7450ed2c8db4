"""A small batch of absorbed attention, what an op of the contract makes of it, and the float64 oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.questions.asking import worst

if TYPE_CHECKING:
    import torch

    from mla_backends import FusedOp
    from mla_backends.api import AttentionSpec

LATENT, ROTARY, SCALE = 512, 64, 0.1147


@dataclass(frozen=True)
class LatentBatch:
    """Requests over a paged cache of bfloat16, as ops see them (`mla_backends.api.BatchView`).

    `first_page` is where the requests' pages begin; `shared` gives every request the same pages, and
    `pages_each` at least so many pages to each, so that batches of other lengths have the same cache.
    """

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    heads: int
    device: Any
    page_size: int = 64
    first_page: int = 0
    shared: bool = False
    pages_each: int = 0

    @cached_property
    def spec(self) -> AttentionSpec:
        """What is fixed when a layer is built."""
        import torch

        from mla_backends.api import AttentionSpec

        return AttentionSpec(
            num_heads=self.heads, kv_lora_rank=LATENT, qk_nope_head_dim=128, qk_rope_head_dim=ROTARY,
            v_head_dim=128, softmax_scale=SCALE, dtype=torch.bfloat16, device=torch.device(self.device),
        )  # fmt: skip

    @cached_property
    def _owned(self) -> list[range]:
        """Return every request's pages, also those that it does not need yet."""
        ranges, start = [], self.first_page
        for keys in self.kv_lens:
            ranges.append(range(start, start + max(self.pages_each, -(-keys // self.page_size))))
            start = start if self.shared else ranges[-1].stop
        return ranges

    @property
    def pages(self) -> list[list[int]]:
        """Return the pages that hold a request's keys, for every request."""
        owned = zip(self._owned, self.kv_lens, strict=True)
        return [list(pages[: -(-keys // self.page_size)]) for pages, keys in owned]

    @cached_property
    def block_table(self) -> torch.Tensor:
        """[B, pages] int32."""
        import torch

        width = max(1, *(len(page) for page in self.pages))
        rows = [page + [0] * (width - len(page)) for page in self.pages]
        return torch.tensor(rows, dtype=torch.int32).to(self.device)

    @cached_property
    def kv_lens_device(self) -> torch.Tensor:
        """[B] int32."""
        import torch

        return torch.tensor(self.kv_lens, dtype=torch.int32).to(self.device)

    @cached_property
    def cu_q(self) -> torch.Tensor:
        """[B + 1] int32."""
        import torch

        return torch.tensor([0, *self.query_lens]).cumsum(0).int().to(self.device)

    @cached_property
    def q(self) -> torch.Tensor:
        """[T, h, c + r]."""
        return self._draw(sum(self.query_lens), self.heads, LATENT + ROTARY)

    @cached_property
    def cache(self) -> torch.Tensor:
        """[pages, page, c + r]; those before `first_page` are zero."""
        import torch

        end, width = max(pages.stop for pages in self._owned), LATENT + ROTARY
        cache = torch.zeros(end, self.page_size, width, dtype=torch.bfloat16, device=self.device)
        cache[self.first_page :] = self._draw(end - self.first_page, self.page_size, width)
        return cache

    def _draw(self, *shape: int) -> torch.Tensor:
        import torch

        generator = torch.Generator().manual_seed(shape[0])
        return torch.randn(shape, generator=generator).to(self.device, torch.bfloat16)

    def run(self, op: FusedOp) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out [T, h, c] and lse [T, h] of an op, which is not asked whether it serves the lengths."""
        import torch

        out = torch.full((*self.q.shape[:2], LATENT), torch.nan, dtype=self.q.dtype, device=self.device)
        lse = torch.full(self.q.shape[:2], torch.nan, device=self.device)
        op(op.prepare(self.spec, self), **self.arguments(), out=out, lse=lse)
        return out, lse

    def arguments(self) -> dict[str, Any]:
        """Return what every call of this batch passes, besides the state and the outputs."""
        tables = {"block_table": self.block_table, "kv_lens": self.kv_lens_device, "cu_q": self.cu_q}
        return {"q": self.q, "cache": self.cache, "softmax_scale": SCALE, **tables}

    def refusals(self, op: FusedOp) -> list[str]:
        """Return why the op says that it cannot serve these lengths."""
        return op.unsupported_batch(self.spec, self.query_lens, self.kv_lens, self.page_size)

    def error(self, out: torch.Tensor, requests: Sequence[int] | None = None) -> float:
        """Return the largest relative error of a row of `out`, over some requests or all."""
        from mla.verify.op_oracle import attend

        largest, first, owned = 0.0, self.cu_q.tolist(), self.pages
        for i in range(len(self.query_lens)) if requests is None else requests:
            rows = slice(first[i], first[i + 1])
            pages = self.cache[owned[i]].reshape(-1, 1, LATENT + ROTARY)[: self.kv_lens[i]].cpu()
            exact, _ = attend(self.q[rows].cpu(), pages, pages[..., :LATENT], SCALE, causal=True)
            largest = max(largest, worst(out[rows], exact))
        return largest
