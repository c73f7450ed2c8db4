"""`PagedCache`: a cache of `transformers` whose latents lie in the pages of a `LatentCache`.

Nothing is copied to attend, requests may have any lengths, and padding takes no room.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from mla.cache import LatentCache
from mla.cache.ragged_batch import RaggedBatch
from mla.integrations.transformers.admission import NO_BEAMS, UnsupportedModel, find_attention, uncompiled
from mla.integrations.transformers.attention import Step, left_padded, left_padding


class NewLatents:
    """A step's new latents [B, 1, t, c], for the attention alone: it reads all others from the pages.

    A model that does not run our ops would take them for the whole history: it is stopped at its first use.
    """

    def __init__(self, rows: torch.Tensor, paged: PagedLayer) -> None:
        self.rows, self.paged, self.requires_grad = rows, paged, rows.requires_grad

    @classmethod
    def __torch_function__(cls, *arguments: Any) -> NoReturn:
        """Raise `UnsupportedModel`."""
        raise UnsupportedModel("only our ops read a PagedCache: call `use_mla` on this model first.")

    @property
    def shape(self) -> NoReturn:
        """Raise `UnsupportedModel`."""
        self.__torch_function__()


class PagedLayer(CacheLayerMixin):
    """One layer of the cache. It does not keep the cache, and so its pages, alive."""

    is_compileable = False
    is_croppable = True

    def __init__(self, cache: PagedCache, layer: Any, index: int) -> None:
        super().__init__()
        self._cache: PagedCache = weakref.proxy(cache)
        self._layer, self._index = layer, index
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """All memory is there from the beginning."""

    @uncompiled
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *arguments: Any, **words: Any
    ) -> tuple[Any, torch.Tensor]:
        """Hand new latents [B, 1, t, c] and [B, 1, t, r] to the attention, to be written to the pages."""
        if not hasattr(self._layer, "mla_attention"):
            raise UnsupportedModel("this model no longer runs our ops, and only they read a PagedCache.")
        latents, width = self._cache.latents, key_states.shape[-1] + value_states.shape[-1]
        holds, given = (latents.config.latent_dim, latents.dtype), (width, key_states.dtype)
        if holds != given:
            raise UnsupportedModel(
                f"this PagedCache holds {holds[0]} numbers of {holds[1]} a token, and this model gives "
                f"{given[0]} of {given[1]}: make a PagedCache of this model."
            )
        return NewLatents(key_states, self), value_states

    def step(self, flags: torch.Tensor, queries: int) -> Step:
        """Return the step that flags [B, 1, 1, s] describe, the same for all layers."""
        return self._cache.step(flags, queries, self._index)

    def write(self, step: Step, latent: NewLatents, pe: torch.Tensor) -> torch.Tensor:
        """Write a step's latents, and return this layer's pages [pages, page, c + r, or bytes]."""
        cache, parts = self._cache, (latent.rows[:, 0], pe[:, 0])
        pages = cache.latents.pages[self._index]
        new = [torch.cat([part[span.request, span.queries] for span in step.spans]) for part in parts]
        pages.flatten(0, 1).index_copy_(0, step.batch.slots, cache.latents.encoded(*new))
        if self._index + 1 == len(cache.layers):
            cache._unfinished.difference_update(cache._sequences)
        return pages

    def update_indexer(self, keys: torch.Tensor) -> torch.Tensor:
        """Hand new index keys [B, t, D] to the attention, to be written to the index pages."""
        return keys

    def write_index(self, step: Step, keys: torch.Tensor) -> torch.Tensor | None:
        """Write a step's index keys, of [B, t, D], and return this layer's index pages."""
        new = torch.cat([keys[span.request, span.queries] for span in step.spans])
        self._cache.latents.write_index(self._index, step.batch.slots, new)
        return self._cache.latents.of_layer(self._index)[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys of a step, and the first one."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return the tokens of the longest request, with its padding."""
        return self._cache.length()

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
    `latents.new_sequences`, says with `use` which ones the next forward is of, and releases them. A deep copy
    has pages of its own, and holds what the requests of the last forward hold. Raises `UnsupportedModel`.
    """

    is_paged = True

    def __init__(self, model: Any, *, max_tokens: int, page_size: int = 64) -> None:
        layers = find_attention(model)
        if not layers or not hasattr(layers[0], "mla_attention"):
            raise UnsupportedModel("only our ops read a PagedCache: call `use_mla(model)` first.")
        if [layer.layer_idx for layer in layers] != list(range(len(layers))):
            raise UnsupportedModel(
                f"{type(model).__name__} has layers without latent attention, and a PagedCache cannot hold "
                "their state."
            )
        self._model, core = model, layers[0].mla_attention.core
        self.latents = LatentCache(
            layers[0].mla_attention.model,
            max_tokens=max_tokens,
            page_size=page_size,
            num_layers=len(layers),
            device=core.device,
            dtype=core.dtype,
            cache_format=core.cache_format,
            index_format=core.index_format,
        )
        self.columns = 0  # tokens of the longest request, with its padding
        self._sequences: list[int] = []
        self._unfinished: set[int] = set()  # of which not all layers have written their new tokens
        self._named = False  # whether `use` said which they are
        self._last: Step
        super().__init__(layers=[PagedLayer(self, layer, index) for index, layer in enumerate(layers)])

    def __repr__(self) -> str:
        """Return the cache's pages and how full they are."""
        return f"PagedCache({self.latents!r})"

    @property
    def argument(self) -> dict[str, PagedCache]:
        """The keyword argument that forwards and `generate` of this `transformers` take caches as."""
        named = "cache" in CausalLMOutputWithPast.__annotations__
        return {"cache" if named else "past_key_values": self}

    @property
    def is_uneven(self) -> bool:
        """Whether `use` named sequences of different lengths, whose next positions only the caller knows."""
        self._leave_out_released()
        return self._named and len({*map(self.latents.length, self._sequences)}) > 1

    def use(self, sequences: Sequence[int]) -> None:
        """Name the sequences of the next forward, in the order of its rows.

        Its attention_mask pads shorter ones on the left, and its position_ids say where each goes on.
        """
        self.columns = max(map(self.latents.length, sequences), default=0)  # raises for an unknown one
        self._sequences, self._named = list(sequences), len(sequences) > 0

    def step(self, flags: torch.Tensor, queries: int, layer: int) -> Step:
        """Return the step of a forward, for which the first layer that asks makes room."""
        if layer == 0:
            self._leave_out_released()
            if self._unfinished.intersection(self._sequences):
                raise UnsupportedModel(
                    "the last forward on these requests broke off: call `reset()`, or release them."
                )
            self._last = self._extended(flags, queries)
            self._unfinished.update(self._sequences if self._last.spans else ())  # without any, none writes
        return self._last

    def length(self) -> int:
        """Return the tokens of the longest request, with its padding."""
        self._leave_out_released()
        return self.columns

    def _leave_out_released(self) -> None:
        """Forget which sequences were released behind this cache's back, as a server may."""
        there = [*filter(self.latents.__contains__, self._sequences)]
        if there != self._sequences:
            self.use(there)

    def _extended(self, flags: torch.Tensor, queries: int) -> Step:
        starts, tokens = left_padding(flags[:, 0, 0] != 0), flags.shape[-1]
        if starts is None:
            raise UnsupportedModel(
                "attention_mask hides tokens in the middle or at the end of a request: a PagedCache takes "
                "padding on the left alone (`tokenizer.padding_side = 'left'`)."
            )
        held = [*map(self.latents.length, self._sequences)] or [0] * len(starts)
        kv_lens = [tokens - start for start in starts]
        new = [min(queries, length) for length in kv_lens]
        if [length - more for length, more in zip(kv_lens, new, strict=True)] != held:
            raise UnsupportedModel(
                f"attention_mask names {kv_lens} tokens of {len(new)} requests, {new} of them new, but this "
                f"cache holds {held}: call `reset()`, or `use` the sequences of this batch."
            )
        batch = self._extend(new)
        self.columns = tokens
        return Step(flags, [], list(left_padded(starts, tokens, queries)), batch)

    def _extend(self, new: list[int]) -> RaggedBatch:
        """Make room for new tokens; nothing is changed where there is none."""
        made = [] if self._sequences else self.latents.new_sequences(len(new))
        try:
            batch = self.latents.extend(self._sequences or made, new)
        except BaseException:
            self.latents.release(made)
            raise
        self._sequences += made
        return batch

    def clear(self) -> None:
        """Free the pages of all sequences, and forget them."""
        self.latents.release(self.latents.sequences)
        self.use(())

    def forget(self, tokens: int) -> None:
        """Forget the last tokens of all requests."""
        self._leave_out_released()
        for sequence in self._sequences:
            self.latents.truncate(sequence, max(0, self.latents.length(sequence) - tokens))
        self.columns = max(0, self.columns - tokens)

    def _refuse_to_rearrange(self, *arguments: Any) -> NoReturn:
        """Raise `UnsupportedModel`."""
        raise UnsupportedModel(NO_BEAMS)

    reorder_cache = batch_repeat_interleave = batch_select_indices = _refuse_to_rearrange  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        """Return a cache for the same model. Raises `UnsupportedModel`."""
        self._leave_out_released()
        size = self.latents.page_size
        made = PagedCache(self._model, max_tokens=self.latents.num_pages * size, page_size=size)
        copies = {sequence: self.latents.copy(sequence, made.latents) for sequence in self._sequences}
        made._sequences = [*copies.values()]
        made._unfinished = {copies[sequence] for sequence in self._unfinished & copies.keys()}
        made.columns, made._named = self.columns, self._named
        return made
