"""Poison the cache, to expose a kernel that reads memory it does not own.

Pages that no request will own hold NaN. Slots past a request's end, inside pages it owns, hold NaN for ops
that declare `nan_safe_tail`, else a large finite number, because a kernel may read them and multiply by zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mla.cache import LatentCache

TAIL = 1e4


class Poison:
    """What to write where, computed once for sequences that will grow to `final_lens`."""

    def __init__(
        self, cache: LatentCache, sequences: Sequence[int], final_lens: Sequence[int], nan_safe_tail: bool
    ) -> None:
        self._cache = cache
        history = [cache.length(sequence) for sequence in sequences]
        kept = torch.cat([cache.slots(sequence) for sequence in sequences])
        growth = [final - now for final, now in zip(final_lens, history, strict=True)]
        cache.extend(sequences, growth)
        owned = torch.cat([cache.slots(sequence) for sequence in sequences])
        for sequence, length in reversed(list(zip(sequences, history, strict=True))):
            cache.truncate(sequence, length)  # last first, to restore the free list
        value = torch.full((cache.num_pages, cache.page_size), torch.nan, device=owned.device)
        value[owned // cache.page_size] = torch.nan if nan_safe_tail else TAIL
        free = torch.ones(value.numel(), dtype=torch.bool, device=owned.device)
        free[kept] = False
        self._slots = free.nonzero()[:, 0]
        self._rows = value.view(-1)[self._slots, None].to(cache.pages.dtype)

    def apply(self) -> None:
        """Overwrite every slot that holds no history."""
        width = self._cache.config.latent_dim
        for layer in self._cache.pages:
            layer.view(-1, width).index_copy_(0, self._slots, self._rows.expand(-1, width))
