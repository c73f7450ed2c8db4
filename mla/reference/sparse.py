"""Sparse attention in plain PyTorch: index keys, the selection of latents, and attention to a selection."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla.cache.formats import IndexFp8, codec_of, index_codec, index_keys, latents
from mla.reference.attention import KEYS_BYTES, LOGITS_BYTES, attend, is_decode
from mla.reference.small import OfFormats, rotate
from mla_backends.api import OPS, AttentionSpec, BatchView, IndexerSpec
from mla_backends.slots import selected_slots


class WriteIndexKey(OfFormats):
    """LayerNorm with bias, rotate the first channels, scatter to the index cache.

    Norm and rotation are in fp32, and rounded once, to the dtype of k; a format encodes what that gives.
    """

    contract = OPS["write_index_key"]
    encodes_rounded = True

    def __call__(
        self,
        *,
        k: torch.Tensor,  # [T, D]
        weight: torch.Tensor,  # [D]
        bias: torch.Tensor,  # [D]
        eps: float,
        cos_sin: torch.Tensor,  # [T, R] fp32
        interleaved: bool,
        slots: torch.Tensor,  # [T] int64
        cache: torch.Tensor,  # [pages, page, D], or bytes [pages, page, D + 4]
        cache_format: str = "",
    ) -> None:
        key = layer_norm(k, weight, bias, eps)
        turned = cos_sin.shape[1]
        row = torch.cat((rotate(key[:, :turned], cos_sin, interleaved), key[:, turned:]), dim=1).to(k.dtype)
        codec = index_codec(cache_format, k.shape[1])
        if codec is None:
            cache.flatten(0, 1).index_copy_(0, slots, row)
        else:
            codec.write(cache, slots, row)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias over the last dimension, in fp32.

    The variance is the mean of squares, as in `torch.nn.LayerNorm`.
    """
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * scale * weight.float() + bias.float()


# ---------------------------------------------------------------------------------------- selection
@dataclass(frozen=True)
class _OnDevice:
    """A state whose launches depend on shapes alone, and follow lengths on the device.

    Of a decode step that selects: requests of `queries` new tokens each, padded to the block table's width.
    """

    queries: int = 0
    graph_safe = True

    def select(
        self,
        q: torch.Tensor,  # [B * queries, H, D]
        weights: torch.Tensor,
        cache: torch.Tensor,
        block_table: torch.Tensor,  # [B, n]
        kv_lens: torch.Tensor,  # [B]
        out: torch.Tensor,
        codec: IndexFp8 | None,
    ) -> None:
        """Select over all slots of the block table, in parts."""
        queries, (tokens, heads, width) = self.queries, q.shape
        slots = block_table.shape[1] * cache.shape[1]
        together = max(1, LOGITS_BYTES // (4 * max(1, slots) * (queries * heads + width)))
        behind = torch.arange(queries - 1, -1, -1, device=q.device)
        for first in range(0, tokens // queries, together):
            part = slice(first, first + together)
            rows = slice(first * queries, min(tokens, (first + together) * queries))
            table = block_table[part].reshape(-1)
            keys = index_keys(cache.index_select(0, table), codec).view(-1, slots, width)
            products = torch.bmm(q[rows].float().view(len(keys), -1, width), keys.mT).relu_()
            scores = torch.bmm(weights[rows].float()[:, None], products.view(-1, heads, slots))[:, 0]
            _take_best(scores, (kv_lens[part, None] - 1 - behind).view(-1, 1), out[rows])


class SelectLatents(OfFormats):
    """Score every token that a query sees and take the best, one request after another.

    Scores are fp32. Queries of a request take turns where scores of all heads need more than LOGITS_BYTES.
    Requests of a decode step on a device are padded, as many at once as that allows.
    """

    contract = OPS["select_latents"]
    nan_safe_tail = True

    def prepare(self, spec: IndexerSpec, batch: BatchView) -> BatchView | _OnDevice:
        fits = spec.device.type != "cpu" and is_decode(batch)
        return _OnDevice(batch.query_lens[0]) if fits else batch

    def __call__(
        self, state: BatchView | _OnDevice, *,
        q: torch.Tensor, weights: torch.Tensor, cache: torch.Tensor,  # [T, H, D], [T, H], [pages, page, D]
        block_table: torch.Tensor, kv_lens: torch.Tensor, cu_q: torch.Tensor,
        out: torch.Tensor,  # [T, topk] int32
        cache_format: str = "",
    ) -> None:  # fmt: skip
        codec, page, start = index_codec(cache_format, q.shape[2]), cache.shape[1], 0
        if isinstance(state, _OnDevice):
            state.select(q, weights, cache, block_table, kv_lens, out, codec)
            return
        for request, (queries, length) in enumerate(zip(state.query_lens, state.kv_lens, strict=True)):
            pages = cache.index_select(0, block_table[request, : -(-length // page)])
            keys = index_keys(pages, codec).flatten(0, 1)[:length]
            step = max(1, LOGITS_BYTES // (4 * q.shape[1] * max(1, length)))
            for first in range(start, start + queries, step):
                run = slice(first, min(first + step, start + queries))
                behind = length - queries - start  # the position of row 0
                last = torch.arange(run.start, run.stop, device=q.device)[:, None] + behind
                scores = index_scores(q[run], weights[run], keys[: max(0, behind + run.stop)])
                _take_best(scores, last, out[run])
            start += queries


def _take_best(scores: torch.Tensor, last: torch.Tensor, out: torch.Tensor) -> None:
    """Write to out [t, topk] the best of scores [t, s] up to the position `last` [t, 1], then -1."""
    scores.masked_fill_(torch.arange(scores.shape[1], device=scores.device) > last, -torch.inf)
    count = min(out.shape[1], scores.shape[1])
    best = scores.topk(count, dim=-1).indices  # what is hidden comes last
    out[:, :count] = best.masked_fill_(best > last, -1)
    out[:, count:] = -1


def index_scores(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return fp32 scores [t, s]: over heads, weights [t, H] times relu(q [t, H, D] . keys [s, D]), summed."""
    heads = q.float().flatten(0, 1) @ keys.float().t()
    return torch.bmm(weights.float()[:, None], heads.relu_().view(*q.shape[:2], len(keys)))[:, 0]


# ---------------------------------------------------------------------------------------- attention
class SparseLatentAttention(OfFormats):
    """Absorbed attention to the latents that each query selects.

    Gathers the selected rows of a few queries, up to KEYS_BYTES, decodes them and attends in fp32. Entries of
    -1 are hidden; a query of nothing else gets out 0 and lse -inf.
    """

    contract = OPS["sparse_latent_attention"]
    nan_safe_tail = True
    lse_optional = True

    def prepare(self, spec: AttentionSpec, batch: BatchView) -> _OnDevice:
        return _OnDevice()

    def __call__(
        self, state: _OnDevice, *,
        q: torch.Tensor, cache: torch.Tensor,  # [T, h, c + r], [pages, page, c + r] or bytes
        block_table: torch.Tensor, kv_lens: torch.Tensor, cu_q: torch.Tensor,
        selection: torch.Tensor,  # [T, topk] int32
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor | None,  # out [T, h, c], lse [T, h] fp32
        cache_format: str = "",
    ) -> None:  # fmt: skip
        codec = codec_of(cache_format, out.shape[2], q.shape[2] - out.shape[2])
        rows, slots = cache.flatten(0, 1), selected_slots(selection, block_table, cu_q, cache.shape[1])
        per_query = slots.shape[1] * max(8 * q.shape[2], 4 * q.shape[1])  # keys as cached and wide, or logits
        step = max(1, KEYS_BYTES // max(1, per_query))
        for first in range(0, q.shape[0], step):
            run = slice(first, first + step)
            absent = (slots[run] < 0)[..., None]
            gathered = rows[slots[run].clamp_min(0).flatten()].view(*slots[run].shape, rows.shape[1])
            keys = latents(gathered, codec).masked_fill_(absent, 0)
            hidden = absent.transpose(1, 2)
            parts = (q[run], keys, keys[..., : out.shape[2]])
            value, sums = attend(*parts, softmax_scale, hidden, with_lse=lse is not None)
            out[run] = value
            if lse is not None and sums is not None:
                lse[run] = sums[..., 0]
