"""`PagedCache`: a cache of `transformers` whose latents lie in the pages of a `LatentCache`.

Nothing is copied to attend, requests may have any lengths, and padding takes no room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from mla.cache import LatentCache
from mla.cache.ragged_batch import RaggedBatch
from mla.errors import CacheFull
from mla.integrations.transformers.errors import UnsupportedModel
from mla.integrations.transformers.step import Step, left_padded, left_padding
from mla.integrations.transformers.survey import find_attention
from mla.integrations.transformers.uncompiled import uncompiled


class PagedLayer(CacheLayerMixin):
    """One layer of the cache."""

    is_compileable = False
    is_croppable = True

    def __init__(self, cache: PagedCache, layer: Any, index: int) -> None:
        super().__init__()
        self._cache, self._layer, self._index = cache, layer, index
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """All memory is there from the beginning."""

    @uncompiled
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *arguments: Any, **words: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand new latents [B, 1, t, c] and [B, 1, t, r] to the attention, which writes them to the pages."""
        if not hasattr(self._layer, "mla_attention"):
            raise UnsupportedModel("this model does not run our ops any more, which alone read a PagedCache.")
        held: Any = key_states.view_as(key_states)
        held.paged = self
        return held, value_states

    def step(self, flags: torch.Tensor, queries: int) -> Step:
        """Return the step that flags [B, 1, 1, s] describe, the same for all layers."""
        return self._cache.step(flags, queries)

    def write(self, step: Step, latent: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
        """Write a step's latents, and return this layer's pages [pages, page, c + r]."""
        pages = self._cache.latents.pages[self._index]
        rows = torch.cat((latent[:, 0], pe[:, 0]), dim=-1)
        new = [rows[span.request, span.queries] for span in step.spans]
        pages.view(-1, pages.shape[-1]).index_copy_(0, step.batch.slots, torch.cat(new))
        return pages

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys of a step, and the first one."""
        return self._cache.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Return the tokens of the longest request, with its padding."""
        return self._cache.columns

    def get_max_length(self) -> int:
        """Return that there is no bound for one request."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` tokens of all requests, when the first layer is asked.

        Raises ValueError for a positive number, as stock layers do.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop() takes a negative number of tokens to remove, got {tokens_to_remove}.")
        if self._index == 0:
            self._cache.forget(-tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens, and free their pages; called for every layer, done by the first."""
        if self._index == 0:
            self._cache.clear()


class PagedCache(Cache):
    """Latents of `max_tokens` tokens in all, for a model that `use_mla` has prepared.

    `model.generate(..., **PagedCache(model, max_tokens=4096).argument)` needs nothing else. A server makes
    `latents.new_sequences`, says with `use` which ones the next forward is of, and releases them. Raises
    `UnsupportedModel`.
    """

    def __init__(self, model: Any, *, max_tokens: int, page_size: int = 64) -> None:
        layers = find_attention(model)
        if not layers or not hasattr(layers[0], "mla_attention"):
            raise UnsupportedModel("a PagedCache is read by our ops alone: call `use_mla(model)` first.")
        if [layer.layer_idx for layer in layers] != list(range(len(layers))):
            raise UnsupportedModel(
                f"{type(model).__name__} has layers of other kinds, whose state a PagedCache does not hold."
            )
        core = layers[0].mla_attention.core
        self.latents = LatentCache(
            core.config,
            max_tokens=max_tokens,
            page_size=page_size,
            num_layers=len(layers),
            device=core.device,
            dtype=core.dtype,
        )
        self.columns = 0  # tokens of the longest request, with its padding
        self._sequences: list[int] = []
        self._last: Step | None = None
        super().__init__(layers=[PagedLayer(self, layer, index) for index, layer in enumerate(layers)])

    @property
    def argument(self) -> dict[str, PagedCache]:
        """The keyword argument that forwards and `generate` of this `transformers` take caches as."""
        named = "cache" in CausalLMOutputWithPast.__annotations__
        return {"cache" if named else "past_key_values": self}

    def use(self, sequences: Sequence[int]) -> None:
        """Say of which sequences the next forward is; its attention_mask pads shorter ones on the left."""
        self._sequences = list(sequences)
        self.columns = max(map(self.latents.length, sequences), default=0)

    def step(self, flags: torch.Tensor, queries: int) -> Step:
        """Make room for a forward's new tokens, and describe it; once per forward."""
        if self._last is None or self._last.flags is not flags:
            self._last = self._extended(flags, queries)
        return self._last

    def _extended(self, flags: torch.Tensor, queries: int) -> Step:
        starts, tokens = left_padding(flags[:, 0, 0] != 0), flags.shape[-1]
        if starts is None:
            raise UnsupportedModel(
                "attention_mask hides tokens in the middle or at the end of a request: a PagedCache takes "
                "padding on the left alone (`tokenizer.padding_side = 'left'`)."
            )
        held = [self.latents.length(sequence) for sequence in self._sequences] or [0] * len(starts)
        kv_lens = [tokens - start for start in starts]
        new = [min(queries, length) for length in kv_lens]
        if len(held) != len(new) or [old + more for old, more in zip(held, new, strict=True)] != kv_lens:
            raise UnsupportedModel(
                f"attention_mask names {kv_lens} tokens of {len(new)} requests, of which {new} are new, and "
                f"this cache holds {held}: call `reset()`, or `use` the sequences that the batch is of."
            )
        batch = self._extend(new)
        self.columns = tokens
        return Step(flags, [], list(left_padded(starts, tokens, queries)), batch)

    def _extend(self, new: list[int]) -> RaggedBatch:
        """Make room for new tokens; nothing is changed where there is none."""
        made = [] if self._sequences else self.latents.new_sequences(len(new))
        try:
            batch = self.latents.extend(self._sequences or made, new)
        except CacheFull:
            self.latents.release(made)
            raise
        self._sequences = self._sequences or made
        return batch

    def clear(self) -> None:
        """Free the pages of all requests, and forget them."""
        self.latents.release(self._sequences)
        self.use(())

    def forget(self, tokens: int) -> None:
        """Forget the last tokens of all requests."""
        for sequence in self._sequences:
            self.latents.truncate(sequence, max(0, self.latents.length(sequence) - tokens))
        self.columns = max(0, self.columns - tokens)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let request i go on from what request beam_idx[i] holds."""
        self._rearrange(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every request."""
        self._rearrange([index for index in range(len(self._sequences)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some requests."""
        self._rearrange(torch.arange(len(self._sequences))[indices.cpu()].tolist())

    def _rearrange(self, sources: Sequence[int]) -> None:
        """Let requests be those of these places; one that comes again is copied.

        Raises `CacheFull` before anything is changed.
        """
        old, counts = self._sequences, Counter(sources)
        kept = [old[place] for place in counts]
        size = self.latents.page_size
        more = sum(
            (count - 1) * -(-self.latents.length(old[place]) // size) for place, count in counts.items()
        )
        left = [sequence for sequence in old if sequence not in kept]
        free = self.latents.free_pages + sum(-(-self.latents.length(one) // size) for one in left)
        if more > free:
            raise CacheFull(f"copies of requests need {more} more pages, and the cache has {free}.")
        self.latents.release(left)
        again = set[int]()
        self._sequences = []
        for place in sources:
            self._sequences.append(self._copy(old[place]) if place in again else old[place])
            again.add(place)

    def _copy(self, sequence: int) -> int:
        """Return a copy of a sequence."""
        (made,) = self.latents.new_sequences(1)
        for layer in range(len(self.layers)):
            self.latents.load(made, *self.latents.read(sequence, layer), layer)
        return made
