"""Problems of `latent_attention`: poisoned pages and tables, any split, lengths other than planned."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from float64_attention import attend_segments

from kernel_problems.memory import (
    NO_PAGE,
    Amid,
    apart,
    differences,
    draw,
    lse_differences,
    output,
    poisoned,
)
from mla_backends.api import AttentionSpec
from mla_backends.selftest import TinyBatch
from mla_backends.triton_ops.latent import LatentAttention, Splits
from mla_backends.triton_ops.launcher import Launcher
from mla_backends.triton_ops.tuning import Tile, Tuning

Lengths = tuple[int, ...]
SMALL = Tile(16, 16, 1, 1)
SPARE = 2  # pages that nobody owns, beside those before and behind the cache
# A cache beyond 2^31 numbers and 2^32 bytes. Nothing but the pages of a problem is ever touched.
FAR_NUMBERS = 2_300_000_000


@dataclass(frozen=True)
class LatentProblem:
    """One call."""

    query_lens: Lengths
    kv_lens: Lengths
    heads: int = 12
    page: int = 16
    latent: int = 512
    rope: int = 64
    dtype: torch.dtype = torch.bfloat16
    tile: Tile = SMALL
    halves: bool = True  # latents as two products
    splits: Splits | None = None  # None: as the op chooses
    planned: Lengths | None = None  # the lengths when the state was prepared, if others
    with_lse: bool = True
    far: bool = False  # pages lie at the end of a cache beyond 32 bits
    step: int = 0  # numbers between queries, if many
    magnitude: float = 1.0  # of the queries

    @property
    def spec(self) -> AttentionSpec:
        width = self.latent + self.rope
        return AttentionSpec(
            num_heads=self.heads,
            kv_lora_rank=self.latent,
            qk_nope_head_dim=128,
            qk_rope_head_dim=self.rope,
            v_head_dim=128,
            softmax_scale=width**-0.5,
            dtype=self.dtype,
            device=torch.device("cpu"),
        )

    @property
    def op(self) -> LatentAttention:
        """Return an op that has not been called."""
        tile = replace(self.tile, halves=self.halves)
        tuning = Tuning(latent={1: tile}, expanded={1: tile})
        return LatentAttention(Launcher(), tuning, 8)

    def wrong(self) -> list[str]:
        """Run the op. Return what is wrong with its outputs."""
        call = _Call(self)
        return call.run(self.op)


class _Call:
    """The operands of a problem."""

    def __init__(self, problem: LatentProblem) -> None:
        self.problem = problem
        p, self.width = problem, problem.latent + problem.rope
        tokens = sum(p.query_lens)
        q = draw(tokens, p.heads, self.width, dtype=p.dtype, seed=1) * p.magnitude
        self.q = apart(q, p.step) if p.step else poisoned(q)
        keys = [draw(n, self.width, dtype=p.dtype, seed=2 + i) for i, n in enumerate(p.kv_lens)]
        self.table, self.cache = self._paged(keys)
        starts = torch.tensor([0, *p.query_lens]).cumsum(0)
        self.cu_q = starts.to(torch.int32)
        pieces = zip(q.split(list(p.query_lens)), keys, strict=True)
        segments = ((piece, k, k[:, : p.latent]) for piece, k in pieces)
        self.truth = attend_segments(segments, p.spec.softmax_scale)

    def _paged(self, keys: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return table and cache: pages in no order, the rest poisoned, the table's last row at its end."""
        p = self.problem
        longest = [max(both) for both in zip(p.kv_lens, p.planned or p.kv_lens, strict=True)]
        counts = [-(-n // p.page) for n in longest]
        cache, pages = self._pages(sum(counts) + SPARE)
        columns = max(1, *counts)
        row = columns + 3
        flat = torch.full(((len(keys) - 1) * row + columns,), NO_PAGE, dtype=torch.int32)
        table = flat.as_strided((len(keys), columns), (row, 1))
        for mine, own, entries in zip(pages.split([*counts, SPARE]), keys, table, strict=False):
            entries[: len(mine)] = mine
            for start in range(0, len(own), p.page):
                rows = own[start : start + p.page]
                cache[mine[start // p.page], : len(rows)] = rows
        return table, cache

    def _pages(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a cache without any contents, and numbers of pages to use."""
        p = self.problem
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        if p.far:
            cache = torch.empty(FAR_NUMBERS // (p.page * self.width), p.page, self.width, dtype=p.dtype)
            return cache, len(cache) - count + order
        whole = torch.full((count + 2, p.page, self.width), torch.nan, dtype=p.dtype)
        return whole[1:-1], order

    def _state(self, op: LatentAttention, lens: torch.Tensor) -> object:
        p = self.problem
        planned = p.planned or p.kv_lens
        lens.copy_(torch.tensor(planned))
        state = op.prepare(p.spec, TinyBatch(p.query_lens, planned, p.page, self.table, lens, self.cu_q))
        splits = p.splits or state.splits
        parts = sum(p.query_lens) * p.heads * splits.max_splits if splits.max_splits > 1 else 0
        return replace(state, splits=splits, parts=torch.full((parts * (p.latent + 1),), torch.nan))

    def run(self, op: LatentAttention) -> list[str]:
        p, lens = self.problem, torch.empty(len(self.problem.kv_lens), dtype=torch.int32)
        state = self._state(op, lens)
        lens.copy_(torch.tensor(p.kv_lens))
        out = output(sum(p.query_lens), p.heads, p.latent, dtype=p.dtype)
        lse: Amid | None = output(sum(p.query_lens), p.heads, dtype=torch.float32) if p.with_lse else None
        op(
            state,
            q=self.q,
            cache=self.cache,
            block_table=self.table,
            kv_lens=lens,
            cu_q=self.cu_q,
            softmax_scale=p.spec.softmax_scale,
            out=out.part,
            lse=None if lse is None else lse.part,
        )
        sums = [] if lse is None else lse_differences(lse, self.truth[1])
        return differences(out, self.truth[0]) + sums
