"""The attention function that `use_mla` registers: latents in, through our ops, heads out.

A `Step` is what a forward on a stock cache asks of our ops, worked out once for all layers."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mla.cache.ragged_batch import RaggedBatch, host_ints
from mla.config import MLAConfig
from mla.integrations.transformers.admission import (
    NO_FORMAT,
    NOT_PREPARED,
    OWN_MASK,
    UnsupportedModel,
    is_ours,
    require_inference,
    uncompiled,
)
from mla.layer.forward import AttentionCore
from mla.layer.plan import WORKSPACE_BYTES, is_sparse
from mla.layer.workspace import Turn, Workspace
from mla.reference.small import rotate

PAGE_SIZE = 64

Keys = slice | torch.Tensor


class Span(NamedTuple):
    """Consecutive queries of a request; each sees one key more than the one before."""

    request: int
    first: int
    tokens: int
    kv_len: int  # keys that the last of them sees

    @property
    def queries(self) -> slice:
        """Where they are among the request's."""
        return slice(self.first, self.first + self.tokens)


@dataclass(eq=False)
class Step:
    """The visible keys of each request, spans of queries, and their batch.

    Queries that see no key are in no span.
    """

    flags: torch.Tensor  # [B, 1, 1, s]: kept, so that no other one has its identity
    keys: list[Keys]  # of each request, among s
    spans: list[Span]
    batch: RaggedBatch

    @classmethod
    def of(cls, flags: torch.Tensor, queries: int, device: torch.device) -> Step:
        """Describe a step of `queries` queries a request; the last query is that of the last key."""
        seen = flags[:, 0, 0] != 0
        starts = left_padding(seen)
        if starts is None:
            keys: list[Keys] = [row.nonzero().view(-1) for row in seen]
            spans = [span for request, row in enumerate(seen) for span in _spans(request, row, queries)]
        else:
            keys = [slice(start, seen.shape[1]) for start in starts]
            spans = list(left_padded(starts, seen.shape[1], queries))
        width = _pages(max(1, int(seen.sum(dim=1).max())))
        table = torch.arange(seen.shape[0] * width, dtype=torch.int32, device="cpu").view(-1, width)
        rows = table[host_ints(span.request for span in spans)]
        lengths = [span.tokens for span in spans], [span.kv_len for span in spans]
        return cls(flags, keys, spans, RaggedBatch(*lengths, rows, PAGE_SIZE, device))


def left_padding(seen: torch.Tensor) -> list[int] | None:
    """Return the first visible key of each request of seen [B, s]; None where others are hidden, too."""
    starts = seen.shape[1] - seen.sum(dim=1)
    if not torch.equal(seen, torch.arange(seen.shape[1], device="cpu") >= starts[:, None]):
        return None
    return list(starts.tolist())


def left_padded(starts: list[int], keys: int, queries: int) -> Iterator[Span]:
    """Yield the spans of requests that see all keys from a first one on; none for a request without keys."""
    for request, start in enumerate(starts):
        if count := min(queries, keys - start):
            yield Span(request, queries - count, count, keys - start)


def _spans(request: int, seen: torch.Tensor, queries: int) -> Iterator[Span]:
    """Yield the spans of a request that sees the keys `seen` [s]: a hidden query is a span of its own."""
    visible, counts = seen[-queries:].tolist(), seen.cumsum(dim=0)[-queries:].tolist()
    first = 0
    for query in range(queries):
        ends = query + 1 == queries or not visible[query] or not visible[query + 1]
        if ends:
            if counts[query]:
                yield Span(request, first, query + 1 - first, counts[query])
            first = query + 1


def _pages(tokens: int) -> int:
    """Return pages for `tokens` tokens, in steps of up to an eighth, since they grow with every step."""
    pages = -(-tokens // PAGE_SIZE)
    unit = 1 << max(0, pages.bit_length() - 4)
    return -(-pages // unit) * unit


# ---------------------------------------------------------------------------------------- attention
class Attention:
    """One layer's attention, in the place of `expand_kv` and the attention function."""

    def __init__(self, core: AttentionCore, steps: Steps, model: MLAConfig) -> None:
        """`model`: the config of all layers, of which the core has that of one."""
        self.core, self._steps, self.model = core, steps, model

    @torch.no_grad()
    def __call__(
        self,
        query: torch.Tensor,  # [B, h, t, n + r], rotated
        latent: torch.Tensor,  # [B, 1, s, c], normed
        pe: torch.Tensor,  # [B, 1, s, r], rotated
        flags: torch.Tensor,  # [B, 1, 1, s], on the host
        picked: Picked | None = None,
    ) -> torch.Tensor:
        """Return [B, t, h, v]; 0 for queries that see no key. Only what an indexer `picked` is attended."""
        held: Any = getattr(latent, "paged", self._steps)  # of a `PagedCache`: latents are new ones alone
        if held is self._steps and (kept := self.core.cache_format or self.core.index_format):
            raise UnsupportedModel(NO_FORMAT.format(kept))
        with self.core.scratch.turn:  # until the result has been copied
            step: Step = held.step(flags, query.shape[2])
            rows = query.transpose(1, 2)  # [B, t, h, n + r]
            out = query.new_zeros(*rows.shape[:3], self.core.config.v_head_dim)
            if not step.spans:
                return out
            selection = None if picked is None else picked.selection(self.core, step, held)
            q = self.core.queries(step.batch.num_tokens)
            counts = [span.tokens for span in step.spans]
            for span, place in zip(step.spans, q.split(counts), strict=True):
                place.copy_(rows[span.request, span.queries])
            heads = self.core(step.batch, held.write(step, latent, pe), selection)
            for span, rows_out in zip(step.spans, heads.split(counts), strict=True):
                out[span.request, span.queries] = rows_out
        return out


class Steps:
    """What the layers of a model share: the step that they are in, and scratch memory."""

    def __init__(self, dtype: torch.dtype, device: torch.device, turn: Turn) -> None:
        self.scratch = Workspace(dtype, device, keeps=WORKSPACE_BYTES, turn=turn)
        self._device = device
        self._last: Step | None = None
        self.zeroes = True  # what lies past a request's end, for an op that reads it

    def step(self, flags: torch.Tensor, queries: int) -> Step:
        """Return the step that these flags describe: the last one while they are the same object."""
        if self._last is None or self._last.flags is not flags:
            self._last = Step.of(flags, queries, self._device)
        return self._last

    def write(self, step: Step, latent: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
        """Return all visible latents, copied to pages [pages, page, c + r].

        Raises `UnsupportedModel` for a cache that has dropped some.
        """
        returned, tokens = latent.shape[2], step.flags.shape[-1]
        if returned < tokens:
            raise UnsupportedModel(
                f"this cache returned {returned} of {tokens} tokens: `use_mla` needs all of them."
            )
        return self._copied("pages", step, latent[:, 0], pe[:, 0], zeroes=self.zeroes)

    def write_index(self, step: Step, keys: torch.Tensor) -> torch.Tensor:
        """Return all visible index keys of keys [B, s, D], copied to pages [pages, page, D]."""
        return self._copied("index_pages", step, keys, zeroes=True)

    def _copied(self, name: str, step: Step, *parts: torch.Tensor, zeroes: bool) -> torch.Tensor:
        """Return the visible rows of parts [B, s, w], side by side in pages [pages, page, sum of all w]."""
        count, width = len(step.keys), step.batch.block_table.shape[1]
        widths = [part.shape[-1] for part in parts]
        pages = self.scratch.take(name, count * width, PAGE_SIZE, sum(widths))
        for request, keys in enumerate(step.keys):
            rows = pages.view(count, -1, sum(widths))[request]
            seen = [part[request, keys] for part in parts]
            for place, part in zip(rows[: len(seen[0])].split(widths, dim=-1), seen, strict=True):
                place.copy_(part)
            if zeroes:
                rows[len(seen[0]) :] = 0
        return pages


@uncompiled
def attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # [B, h, t, n + r]
    latent: torch.Tensor,  # [B, 1, s, c]
    pe: torch.Tensor,  # [B, 1, s, r]
    attention_mask: torch.Tensor | None,
    indices: Picked | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as `transformers` asks an attention function to; return [B, t, h, v] and no weights.

    Raises `UnsupportedModel` for what our ops do not do; `Check` does before, unless a layer is called alone.
    """
    attention: Attention | None = getattr(module, "mla_attention", None)
    if attention is None:
        raise UnsupportedModel(NOT_PREPARED)
    require_inference(query, latent, pe, training=module.training)
    if attention_mask is None or not is_ours(attention_mask, query.shape[2]):
        raise UnsupportedModel(OWN_MASK)
    return attention(query, latent, pe, attention_mask, indices), None


# ---------------------------------------------------------------------------------------------------- indexer
# The indexer of a layer under `use_mla`: its projections are stock, scores and selection are our ops'.
#
# `transformers` hands on what an indexer returns and looks at none of it: to the layer's attention function
# as `indices`, and to the layers after it that share a selection. So the indexer returns a `Picked`, in which
# the attention, which knows the step, makes the selection.


class Picked:
    """What a layer with an indexer found for itself and for those that share its selection.

    Of a forward of B requests with t new tokens: rotated queries q [B, t, H, D], weights [B, t, H] fp32 with
    every factor on scores, and normed and rotated keys [B, s, D] of all tokens, or of a `PagedCache`'s new
    ones. The selection is made at most once per step; they are let go of then.
    """

    def __init__(self, q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> None:
        self._scored: tuple[torch.Tensor, ...] | None = (q, weights, keys)
        self._selection: torch.Tensor | None = None

    def selection(self, core: AttentionCore, step: Any, held: Any) -> torch.Tensor | None:
        """Return the selection [T, topk] int32 of a step; None where all keys are attended.

        Made by the layer that asks first, which is the one with the indexer. `held` holds its keys: a model's
        `Steps`, or a layer of a `PagedCache`.
        """
        if self._scored is not None:
            (*scored, keys), self._scored = self._scored, None
            pages, batch = held.write_index(step, keys), step.batch
            if is_sparse(core.config, batch.query_lens, batch.kv_lens):
                q, weights = (
                    torch.cat([x[span.request, span.queries] for span in step.spans]) for x in scored
                )
                self._selection = core.select(q, weights, batch, pages)
        return self._selection


class Indexing:
    """The `forward` of a stock indexer under `use_mla`. It does not keep the indexer alive.

    Keys keep the layout of stock caches, whose rotated pairs are i and i + r/2: scores are the same for any
    order of channels that queries and keys have in common.
    """

    def __init__(self, indexer: Any, config: MLAConfig) -> None:
        self._indexer, self._config = weakref.ref(indexer), config

    @uncompiled
    @torch.no_grad()
    def __call__(
        self,
        hidden_states: torch.Tensor,  # [B, t, d]
        q_resid: torch.Tensor,  # [B, t, q_lora_rank], normed
        position_embeddings: tuple[torch.Tensor, torch.Tensor],  # cosines and sines, [B, t, r] each
        *arguments: Any,
        **words: Any,
    ) -> Picked:
        """Return what the layer's attention makes a selection of; keys go through the cache as stock ones."""
        indexer: Any = self._indexer()
        config, half = self._config, self._config.qk_rope_head_dim // 2
        cos_sin = torch.cat([part[..., :half] for part in position_embeddings], dim=-1).float()
        q = indexer.wq_b(q_resid).unflatten(-1, (config.index_n_heads, config.index_head_dim))
        q = self._rotated(q, cos_sin[:, :, None])
        keys = self._rotated(indexer.k_norm(indexer.wk(hidden_states)), cos_sin)
        cache = words.get("cache", words.get("past_key_values"))
        if cache is not None:
            keys = cache.update_indexer(keys, indexer.layer_idx)
        wide = indexer.weights_proj(hidden_states.to(indexer.weights_proj.weight.dtype))
        return Picked(q, wide.float() * config.index_scale, keys)

    def _rotated(self, x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
        """Return x [.., D] with its first r channels rotated, pairs apart as stock caches have them."""
        turned, rest = x.tensor_split((self._config.qk_rope_head_dim,), dim=-1)
        if self._config.indexer_rope_interleave:
            turned = torch.cat((turned[..., 0::2], turned[..., 1::2]), dim=-1)
        return torch.cat((rotate(turned, cos_sin, interleaved=False).to(x.dtype), rest), dim=-1)
