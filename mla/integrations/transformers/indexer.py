"""The indexer of a layer under `use_mla`: its projections are stock, scores and selection are our ops'.

`transformers` hands on what an indexer returns and looks at none of it: to the layer's attention function as
`indices`, and to the layers after it that share a selection. So the indexer returns a `Picked`, in which the
attention, which knows the step, makes the selection.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, Protocol

import torch

from mla.config import MLAConfig
from mla.integrations.transformers.errors import uncompiled
from mla.layer.forward import AttentionCore
from mla.layer.plan import is_sparse
from mla.reference.small import rotate


class Scored(NamedTuple):
    """What an indexer computes of a forward of B requests with t new tokens."""

    q: torch.Tensor  # [B, t, H, D], rotated
    weights: torch.Tensor  # [B, t, H] fp32, with every factor on scores
    keys: torch.Tensor  # [B, s, D], normed and rotated: of all tokens, or of a `PagedCache`'s new ones


class Held(Protocol):
    """What holds index keys: a model's scratch memory, or a layer of a `PagedCache`."""

    def write_index(self, step: Any, keys: torch.Tensor) -> torch.Tensor:
        """Write index keys [B, s, D] of a step and return the pages [pages, page, D] that have all of it."""


class Picked:
    """What a layer with an indexer found for itself and for those that share its selection.

    The selection is made at most once per step. Queries, weights and keys are let go of then.
    """

    def __init__(self, scored: Scored) -> None:
        self._scored: Scored | None = scored
        self._selection: torch.Tensor | None = None

    def selection(self, core: AttentionCore, step: Any, held: Held) -> torch.Tensor | None:
        """Return the selection [T, topk] int32 of a step; None where all keys are attended.

        Made by the layer that asks first, which is the one with the indexer.
        """
        if self._scored is not None:
            (q, weights, keys), self._scored = self._scored, None
            pages, batch = held.write_index(step, keys), step.batch
            if is_sparse(core.config, batch.query_lens, batch.kv_lens):
                q, weights = (
                    torch.cat([x[span.request, span.queries] for span in step.spans]) for x in (q, weights)
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
        config = self._config
        half = config.qk_rope_head_dim // 2
        cos_sin = torch.cat([part[..., :half] for part in position_embeddings], dim=-1).float()
        q = indexer.wq_b(q_resid).unflatten(-1, (config.index_n_heads, config.index_head_dim))
        q = self._rotated(q, cos_sin[:, :, None])
        keys = self._rotated(indexer.k_norm(indexer.wk(hidden_states)), cos_sin)
        cache = words.get("cache", words.get("past_key_values"))
        if cache is not None:
            keys = cache.update_indexer(keys, indexer.layer_idx)
        wide = indexer.weights_proj(hidden_states.to(indexer.weights_proj.weight.dtype))
        return Picked(Scored(q, wide.float() * config.index_scale, keys))

    def _rotated(self, x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
        """Return x [.., D] with its first r channels rotated, pairs apart as stock caches have them."""
        turned, rest = x.tensor_split((self._config.qk_rope_head_dim,), dim=-1)
        if self._config.indexer_rope_interleave:
            turned = torch.cat((turned[..., 0::2], turned[..., 1::2]), dim=-1)
        return torch.cat((rotate(turned, cos_sin, interleaved=False).to(x.dtype), rest), dim=-1)
