"""`ShardedCache`: one rank's tokens of every request.

Token i of a request is on rank i // interleave mod world. Page tables are those of rank 0, whose share of a
request is never the smaller one: so all ranks hand out the same pages, and are full at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mla.cache import LatentCache
from mla.cache.latent_cache import check_history
from mla.cache.ragged_batch import whole_numbers
from mla.config import MLAConfig
from mla.parallel.batch import ShardedBatch, ShardedMemory, most_rows
from mla.parallel.share import Share


class ShardedCache:
    """A `LatentCache` that holds one share of the tokens; lengths are those of whole requests.

    `share` says which tokens. Other arguments are `LatentCache`'s, with `max_tokens` of all ranks together.
    """

    def __init__(self, config: MLAConfig, share: Share, *, max_tokens: int, **arguments: Any) -> None:
        self.share = share
        self._local = LatentCache(config, max_tokens=share.first(max_tokens), **arguments)
        self._lengths: dict[int, int] = {}
        self._memory: ShardedMemory | None = None  # of the last step

    @property
    def config(self) -> MLAConfig:
        """The layer's config."""
        return self._local.config

    @property
    def pages(self) -> torch.Tensor:
        """This share's latents [layers, pages, page_size, c + r]."""
        return self._local.pages

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self._local.page_size

    @property
    def num_pages(self) -> int:
        """Pages on this rank, and on every other."""
        return self._local.num_pages

    @property
    def generation(self) -> int:
        """A number that changes with every change of lengths."""
        return self._local.generation

    def length(self, sequence: int) -> int:
        """Return the tokens cached for a sequence, on all ranks."""
        self._local.length(sequence)  # raises ValueError for an unknown one
        return self._lengths[sequence]

    def slot(self, sequence: int, token: int) -> int:
        """Return the row of a flattened layer that holds one of this rank's tokens of a sequence."""
        return self._local.slot(sequence, token)

    def slots(self, sequence: int) -> torch.Tensor:
        """Return the rows of a flattened layer that hold this rank's tokens of a sequence, in their order."""
        own = int(self.share.count(torch.tensor([self.length(sequence)], device="cpu")))
        return self._local.slots(sequence)[:own]

    def new_sequences(self, count: int) -> list[int]:
        """Return the ids of `count` empty sequences, the same on every rank."""
        made = self._local.new_sequences(count)
        self._lengths.update(dict.fromkeys(made, 0))
        return made

    def extend(self, sequences: Sequence[int], query_lens: Sequence[int]) -> ShardedBatch:
        """Make room for `query_lens[i]` new tokens of each sequence and return the step's batch.

        Raises what `LatentCache.extend` does, on every rank or on none.
        """
        sequences, query_lens = whole_numbers("sequences", sequences), whole_numbers("query_lens", query_lens)
        past = [self.length(sequence) for sequence in sequences]
        kv_lens = [length + new for length, new in zip(past, query_lens, strict=False)]
        grown = list(query_lens)  # in case the cache refuses them
        if len(past) == len(grown) and min(grown, default=0) >= 0:
            grown = [
                self.share.first(now) - self.share.first(old) for now, old in zip(kv_lens, past, strict=True)
            ]
        table = self._local.grow(sequences, grown)
        try:
            size = (sum(query_lens), most_rows(self.share, query_lens), table.shape[1])
            if self._memory is None or not self._memory.fits(*size):
                self._memory = ShardedMemory(*size, self.pages.device)
            batch = ShardedBatch(self, sequences, query_lens, kv_lens, table, self._memory)
        except BaseException:
            self._local.shrink(sequences, grown)
            raise
        self._lengths.update(zip(sequences, kv_lens, strict=True))
        return batch

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all tokens of a sequence past `length`."""
        sequence, length = whole_numbers("a sequence and its length", (sequence, length))
        if not 0 <= length <= self.length(sequence):
            raise ValueError(f"cannot truncate a sequence of {self.length(sequence)} tokens to {length}.")
        self._local.truncate(sequence, self.share.first(length))
        self._lengths[sequence] = length

    def release(self, sequences: Sequence[int]) -> None:
        """Free the pages of sequences and forget their ids."""
        sequences = whole_numbers("sequences", sequences)
        self._local.release(sequences)
        for sequence in sequences:
            del self._lengths[sequence]

    def load(self, sequence: int, kv: torch.Tensor, pe: torch.Tensor, layer: int = 0) -> None:
        """Store this rank's tokens of a whole history: kv [s, c] already normed, pe [s, r] already rotated.

        As `LatentCache.load`, with the history of all ranks.
        """
        count = check_history(self.config, kv, pe)
        if self.length(sequence) not in (0, count):
            raise ValueError(f"load() got {count} tokens for a sequence of {self.length(sequence)}.")
        own = self.share.owned(torch.arange(count, device="cpu"))
        missing = self.share.first(count) - int(own.sum())  # rows that rank 0 has and this one has not
        spare = lambda x: torch.cat((x[own.to(x.device)], x.new_zeros(missing, x.shape[1])))  # noqa: E731
        self._local.load(sequence, spare(kv), spare(pe), layer)
        self._lengths[sequence] = count
