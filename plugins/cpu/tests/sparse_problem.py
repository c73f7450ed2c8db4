"""A ragged batch for sparse attention in scattered pages, and its truth in float64, query by query."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from mla.cache.formats import index_codec
from mla.cases.memory import Layout, Pages
from mla_backends.api import IndexerSpec

HOST = torch.device("cpu")


@dataclass
class SparseBatch:
    """Lengths of requests, and their tables; slots and pages that nobody owns are NaN."""

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    page_size: int = 4
    seed: int = 0
    draw: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.draw = torch.Generator().manual_seed(self.seed)
        layout = Layout(page_size=self.page_size, unowned=torch.nan, tail=torch.nan, shuffle=self.seed)
        self.pages = Pages.of(self.kv_lens, layout)
        self.block_table = self.pages.table
        self.kv_lens_device = torch.tensor(self.kv_lens, dtype=torch.int32)
        self.cu_q = torch.tensor([0, *self.query_lens]).cumsum(0).int()

    @property
    def tokens(self) -> int:
        return sum(self.query_lens)

    @property
    def tables(self) -> dict[str, torch.Tensor]:
        return {"block_table": self.block_table, "kv_lens": self.kv_lens_device, "cu_q": self.cu_q}

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self.draw).to(dtype)

    def queries(self) -> list[tuple[int, int, int]]:
        """Return (token, first key among those of all requests, keys that it sees) of every query."""
        rows, first = [], 0
        for new, length in zip(self.query_lens, self.kv_lens, strict=True):
            rows += [(len(rows) + i, first, max(0, length - new + i + 1)) for i in range(new)]
            first += length
        return rows

    def index_cache(self, keys: torch.Tensor, index_format: str = "") -> torch.Tensor:
        """Return the cache of index keys [K, D], as bytes in a format."""
        codec = index_codec(index_format, keys.shape[1])
        if codec is None:
            return self.pages.cache(keys)
        cache = torch.full((self.pages.count, self.page_size, codec.token_bytes), 255, dtype=torch.uint8)
        codec.write(cache, self.pages.slots, keys)
        return cache

    def true_scores(self, q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> list[torch.Tensor]:
        """Return the scores [seen] in float64 of what each query sees."""
        scores = []
        for token, first, seen in self.queries():
            heads = (keys[first : first + seen].double() @ q[token].double().T).clamp_min(0)
            scores.append(heads @ weights[token].double())
        return scores


def indexer_spec(heads: int, width: int, turned: int, topk: int, **facts: Any) -> IndexerSpec:
    return IndexerSpec(heads, width, turned, topk, **({"dtype": torch.float32, "device": HOST} | facts))
