"""The attention function that `use_mla` registers: latents in, through our ops, heads out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mla.cache.ragged_batch import RaggedBatch
from mla.integrations.transformers.errors import UnsupportedModel, require_inference
from mla.layer.core import AttentionCore
from mla.layer.workspace import Workspace

PAGE_SIZE = 64


@dataclass(eq=False)
class Step:
    """One forward of a model on a stock cache: what all its layers share."""

    ranges: torch.Tensor  # [B, 1, 1, 2] int32, on the host; kept, so that no other one has its identity
    starts: list[int]  # of each request's keys
    stop: int
    new: list[int]  # queries of each request
    batch: RaggedBatch

    @classmethod
    def of(cls, ranges: torch.Tensor, queries: int, device: torch.device) -> Step:
        """Describe a step of so many queries a request."""
        starts, stops = (column.tolist() for column in ranges[:, 0, 0].unbind(1))
        stop = stops[0]
        kv_lens = [stop - start for start in starts]
        new = [min(queries, length) for length in kv_lens]
        width = pages_of(max(kv_lens))
        table = torch.arange(len(starts) * width, dtype=torch.int32).view(-1, width)
        return cls(ranges, starts, stop, new, RaggedBatch(new, kv_lens, table, PAGE_SIZE, device))


def pages_of(tokens: int) -> int:
    """Return pages for so many tokens, of which there are a power of two: they grow with every step."""
    return 1 << max(0, -(-tokens // PAGE_SIZE) - 1).bit_length()


class Attention:
    """One layer's attention, in the place of `expand_kv` and the attention function."""

    def __init__(self, core: AttentionCore, steps: Steps) -> None:
        self.core, self._steps = core, steps

    @torch.no_grad()
    def __call__(
        self,
        query: torch.Tensor,  # [B, h, t, n + r], rotated
        latent: torch.Tensor,  # [B, 1, s, c], normed
        pe: torch.Tensor,  # [B, 1, s, r], rotated
        ranges: torch.Tensor,  # [B, 1, 1, 2], on the host
    ) -> torch.Tensor:
        """Return [B, t, h, v]; 0 for queries that see no key."""
        paged: Any = getattr(
            latent, "paged", None
        )  # a layer of a `PagedCache`, which has no latents but new ones
        held = self._steps if paged is None else paged
        step: Step = held.step(ranges, query.shape[2])
        q = self.core.queries(step.batch.num_tokens)
        rows = query.transpose(1, 2)  # [B, t, h, n + r]
        for place, part in zip(q.split(step.new), rows, strict=True):
            place.copy_(part[part.shape[0] - place.shape[0] :])
        heads = self.core(q, step.batch, held.write(step, latent, pe))
        if sum(step.new) == rows.shape[0] * rows.shape[1]:
            return heads.view(*rows.shape[:3], -1).clone()
        out = heads.new_zeros(*rows.shape[:3], heads.shape[-1])
        for part, found in zip(out, heads.split(step.new), strict=True):
            part[part.shape[0] - found.shape[0] :] = found
        return out


class Steps:
    """What the layers of a model share: the step that they are in, and scratch memory."""

    def __init__(self, dtype: torch.dtype, device: torch.device, keeps: int) -> None:
        self.scratch = Workspace(dtype, device, keeps=keeps)
        self._device = device
        self._last: Step | None = None

    def step(self, ranges: torch.Tensor, queries: int) -> Step:
        """Return the step that these ranges describe: the last one while they are the same object."""
        if self._last is None or self._last.ranges is not ranges:
            self._last = Step.of(ranges, queries, self._device)
        return self._last

    def write(self, step: Step, latent: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
        """Return all visible latents, copied to pages [pages, page, c + r]."""
        count, width = step.batch.block_table.shape
        c, r = latent.shape[-1], pe.shape[-1]
        pages = self.scratch.take("pages", count * width, PAGE_SIZE, c + r)
        rows = pages.view(count, width * PAGE_SIZE, c + r)
        for request, start in enumerate(step.starts):
            visible = slice(start, step.stop)
            target = rows[request, : step.stop - start]
            target[:, :c] = latent[request, 0, visible]
            target[:, c:] = pe[request, 0, visible]
        return pages


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # [B, h, t, n + r]
    latent: torch.Tensor,  # [B, 1, s, c]
    pe: torch.Tensor,  # [B, 1, s, r]
    attention_mask: torch.Tensor | None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as `transformers` asks an attention function to; return [B, t, h, v] and no weights."""
    attention: Attention | None = getattr(module, "mla_attention", None)
    if attention is None:
        raise UnsupportedModel("this layer was not prepared by `use_mla`: call it on the whole model.")
    require_inference(query, module.training)
    if attention_mask is None or attention_mask.dtype != torch.int32:
        raise UnsupportedModel(
            "`use_mla` takes no mask of one's own [batch, 1, queries, keys]: give attention_mask "
            "[batch, tokens]."
        )
    return attention(query, latent, pe, attention_mask), None
