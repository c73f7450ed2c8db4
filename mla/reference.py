"""Every op in plain PyTorch: right on any torch device, and the yardstick a fused op is held to.

Logits, softmax and norms are fp32 whatever the dtype of the tensors. Attention is written once
(`attend`), over groups of requests of about equal length, and reads only slots a request owns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mla.batch import host_ints
from mla_backends.api import OPS, AttentionSpec, BatchView, FusedOp, SegmentLengths

#: Bytes of fp32 logits one group may hold; longer work is cut into runs of queries.
LOGITS_BYTES = 16 << 20
#: A request joins a group of shorter ones while that pads the shorter by at most this factor.
PADDING = 1.25


class Linear(FusedOp):
    """y = x W^T + b."""

    contract = OPS["linear"]

    def __call__(self, packed: Any, *, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        weight = packed.data  # [o, i]
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)


class BatchedLinear(FusedOp):
    """out[t, h, o] = sum_i x[t, h, i] W[h, o, i]: one weight per head."""

    contract = OPS["batched_linear"]

    def __call__(self, packed: Any, *, x: torch.Tensor, out: torch.Tensor) -> None:
        out.transpose(0, 1).copy_(torch.bmm(x.transpose(0, 1), packed.data.transpose(1, 2)))


class RmsNorm(FusedOp):
    """x / rms(x) * weight, rounded once."""

    contract = OPS["rms_norm"]

    def __call__(self, *, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        out.copy_(rms_norm(x, weight, eps))


class RotateQuery(FusedOp):
    """Rotate every head of x by its token's angles."""

    contract = OPS["rotate_query"]

    def __call__(
        self, *, x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool, out: torch.Tensor
    ) -> None:
        out.copy_(rotate(x, cos_sin[:, None, :], interleaved))


class WriteLatent(FusedOp):
    """Norm the latent, rotate the shared key, scatter both to the cache."""

    contract = OPS["write_latent"]

    def __call__(
        self,
        *,
        kv_a: torch.Tensor,  # [T, c + r]
        weight: torch.Tensor,  # [c]
        eps: float,
        cos_sin: torch.Tensor,  # [T, r] fp32
        interleaved: bool,
        slots: torch.Tensor,  # [T] int64
        cache: torch.Tensor,  # [pages, page, c + r]
    ) -> None:
        latent, key = kv_a.split((weight.shape[0], cos_sin.shape[1]), dim=1)
        row = torch.cat((rms_norm(latent, weight, eps), rotate(key, cos_sin, interleaved)), dim=1)
        cache.view(-1, kv_a.shape[1]).index_copy_(0, slots, row.to(cache.dtype))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * scale * weight


def rotate(x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Return x [.., r] rotated by cos_sin [.., r] (cosines, then sines), in fp32.

    Interleaved: channels (0, 1), (2, 3), ... are the pairs, as in DeepSeek's checkpoints, and stay in that
    order. Otherwise channel i pairs with i + r/2.
    """
    cos, sin = cos_sin.chunk(2, dim=-1)
    wide = x.float()
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    return torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)


def attend(
    q: torch.Tensor,  # [g, t, dk]
    k: torch.Tensor,  # [g, s, dk]
    v: torch.Tensor,  # [g, s, dv]
    scale: float,
    hidden: torch.Tensor | None,  # bool, broadcast to [g, t, s]: key s is not visible to query t
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax(scale q k^T) v [g, t, dv] and its natural log-sum-exp [g, t, 1], both fp32.

    A query that sees no key gets 0 and -inf.
    """
    weights = torch.bmm(q.float(), k.float().transpose(1, 2)).mul_(scale)
    if hidden is not None:
        weights.masked_fill_(hidden, -torch.inf)
    top = weights.amax(-1, keepdim=True).clamp_min_(torch.finfo(weights.dtype).min)  # -inf - -inf is NaN
    total = weights.sub_(top).exp_().sum(-1, keepdim=True)
    value = torch.bmm(weights, v.float()).div_(total.clamp_min(torch.finfo(weights.dtype).tiny))
    return value, total.log_().add_(top)


# ------------------------------------------------------------------------------------ latent attention


@dataclass(frozen=True)
class _Row:
    """A run of queries of one request, and the keys the last of them sees."""

    request: int
    first_query: int  # index into the tokens of the batch
    queries: int
    keys: int


@dataclass(frozen=True)
class _Group:
    """Rows of equal query count that are attended together."""

    queries: int
    keys: int  # padded
    tokens: slice | torch.Tensor  # the queries, row after row
    last_key: torch.Tensor | None  # [rows, queries, 1] int64 last visible key; None: every key is visible


@dataclass(frozen=True)
class _LatentState:
    groups: tuple[_Group, ...]
    slots: tuple[torch.Tensor, ...]  # per group [rows * keys] int64 into the flattened cache
    empty: tuple[slice, ...]  # tokens that see no key: rows a graph pads its batch with


class LatentAttention(FusedOp):
    """Absorbed attention: all heads are queries of one key/value head, the latent row itself."""

    contract = OPS["latent_attention"]
    nan_safe_tail = True

    def prepare(self, spec: AttentionSpec, batch: BatchView) -> _LatentState:
        rows = sorted(_cut(batch, spec.num_heads), key=lambda row: (row.queries, row.keys))
        groups = list(_gather_rows([row for row in rows if row.keys > 0], spec.num_heads))
        index = _index(groups, batch)
        return _LatentState(
            groups=tuple(map(_group, groups, index.split([len(members) for members in groups]))),
            slots=_slots(groups, index, batch),
            empty=tuple(slice(r.first_query, r.first_query + r.queries) for r in rows if r.keys <= 0),
        )

    def __call__(
        self,
        state: _LatentState,
        *,
        q: torch.Tensor,  # [T, h, c + r]
        cache: torch.Tensor,  # [pages, page, c + r]
        block_table: torch.Tensor,
        kv_lens: torch.Tensor,
        cu_q: torch.Tensor,
        softmax_scale: float,
        out: torch.Tensor,  # [T, h, c]
        lse: torch.Tensor,  # [T, h] fp32
    ) -> None:
        flat = cache.view(-1, cache.shape[-1])
        for group, slots in zip(state.groups, state.slots, strict=True):
            _attend_group(group, q, flat.index_select(0, slots), softmax_scale, out, lse)
        for tokens in state.empty:
            out[tokens] = 0
            lse[tokens] = -torch.inf


def _attend_group(
    group: _Group, q: torch.Tensor, rows: torch.Tensor, scale: float, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Attend one group; `rows` [g * keys, c + r] are its latents. Heads fold into the query dimension."""
    heads, width, latent = q.shape[1], q.shape[2], out.shape[2]
    keys = rows.float().view(-1, group.keys, width)
    hidden = None
    if group.last_key is not None:
        position = torch.arange(group.keys, device=q.device)
        hidden = (position > group.last_key).repeat_interleave(
            heads, dim=1, output_size=group.queries * heads
        )
    folded = q[group.tokens].reshape(-1, group.queries * heads, width)
    value, lse_rows = attend(folded, keys, keys[..., :latent], scale, hidden)
    out[group.tokens] = value.view(-1, heads, latent).to(out.dtype)
    lse[group.tokens] = lse_rows.view(-1, heads)


def _cut(batch: BatchView, heads: int) -> Iterator[_Row]:
    """Cut each request's queries into runs whose logits fit the cap."""
    start = 0
    for request, (query_len, kv_len) in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
        step = max(1, LOGITS_BYTES // (4 * heads * max(1, kv_len)))
        for offset in range(0, query_len, step):
            count = min(step, query_len - offset)
            yield _Row(request, start + offset, count, kv_len - query_len + offset + count)
        start += query_len


def _gather_rows(rows: Sequence[_Row], heads: int) -> Iterator[list[_Row]]:
    """Group sorted rows of equal query count and about equal key count, within the cap on logits."""
    members: list[_Row] = []
    for row in rows:
        logits = 4 * heads * row.queries * row.keys * (len(members) + 1)
        if members and (
            row.queries != members[0].queries or row.keys > PADDING * members[0].keys or logits > LOGITS_BYTES
        ):
            yield members
            members = []
        members.append(row)
    if members:
        yield members


def _index(groups: Sequence[Sequence[_Row]], batch: BatchView) -> torch.Tensor:
    """Return [rows, 4] int64 on the device: start in the flat block table, owned keys, padded keys, query."""
    width = batch.block_table.shape[1]
    values: list[int] = []
    for members in groups:
        padded = members[-1].keys
        for row in members:
            values += (row.request * width, row.keys, padded, row.first_query)
    return host_ints(values).view(-1, 4).to(batch.block_table.device, non_blocking=True)


def _slots(
    groups: Sequence[Sequence[_Row]], index: torch.Tensor, batch: BatchView
) -> tuple[torch.Tensor, ...]:
    """Return per group its rows' slots, padding repeating the last owned one, all computed at once."""
    sizes = [len(members) * members[-1].keys for members in groups]
    total, device = sum(sizes), index.device
    table_start, owned, padded, _ = index.unbind(dim=1)
    row = torch.arange(len(index), device=device).repeat_interleave(padded, output_size=total)
    first = padded.cumsum(0) - padded
    position = torch.arange(total, device=device) - first.index_select(0, row)
    position = torch.minimum(position, (owned - 1).index_select(0, row))
    shift, mask = batch.page_size.bit_length() - 1, batch.page_size - 1
    entry = table_start.index_select(0, row) + (position >> shift)
    pages = batch.block_table.reshape(-1).index_select(0, entry).long()
    return ((pages << shift) + (position & mask)).split(sizes)


def _group(members: Sequence[_Row], index: torch.Tensor) -> _Group:
    """Resolve where a group's queries are and which keys they see."""
    queries, keys, device = members[0].queries, members[-1].keys, index.device
    start = members[0].first_query
    tokens: slice | torch.Tensor = slice(start, start + queries * len(members))
    if any(row.first_query != start + i * queries for i, row in enumerate(members)):
        tokens = (index[:, 3:] + torch.arange(queries, device=device)).view(-1)
    last_key = None
    if queries > 1 or members[0].keys != keys:
        last_key = (index[:, 1:2] - queries + torch.arange(queries, device=device))[..., None]
    return _Group(queries, keys, tokens, last_key)


# ---------------------------------------------------------------------------------- expanded attention


class ExpandedAttention(FusedOp):
    """Ordinary multi-head attention, one ragged segment after the other."""

    contract = OPS["expanded_attention"]

    def prepare(self, spec: AttentionSpec, batch: SegmentLengths) -> SegmentLengths:
        return batch

    def __call__(
        self,
        state: SegmentLengths,
        *,
        q: torch.Tensor,  # [Tq, h, n + r]
        k: torch.Tensor,  # [Tk, h, n + r]
        v: torch.Tensor,  # [Tk, h, v]
        softmax_scale: float,
        out: torch.Tensor,  # [Tq, h, v]
        lse: torch.Tensor,  # [Tq, h] fp32
    ) -> None:
        segments = zip(
            *(tensor.split(state.query_lens) for tensor in (q, out, lse)),
            *(tensor.split(state.kv_lens) for tensor in (k, v)),
            strict=True,
        )
        for segment in segments:
            _attend_segment(*segment, softmax_scale, state.causal)


def _attend_segment(
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
) -> None:
    """Attend one segment, cutting its queries so that the logits fit the cap."""
    heads, (queries, keys) = q.shape[1], (q.shape[0], k.shape[0])
    k, v = (tensor.transpose(0, 1).float() for tensor in (k, v))  # [h, s, d]
    step = max(1, LOGITS_BYTES // (4 * heads * max(1, keys)))
    for start in range(0, queries, step):
        run = slice(start, min(start + step, queries))
        seen = max(0, keys - queries + run.stop) if causal else keys
        hidden = None
        if causal and run.stop - start > 1:
            last = torch.arange(start, run.stop, device=q.device) + (keys - queries)
            hidden = torch.arange(seen, device=q.device) > last[:, None]
        value, row_lse = attend(q[run].transpose(0, 1), k[:, :seen], v[:, :seen], scale, hidden)
        out[run] = value.transpose(0, 1).to(out.dtype)
        lse[run] = row_lse[..., 0].transpose(0, 1)


#: The reference for every op, by op name.
REFERENCE: Mapping[str, FusedOp] = {
    "linear": Linear(),
    "batched_linear": BatchedLinear(),
    "rms_norm": RmsNorm(),
    "rotate_query": RotateQuery(),
    "write_latent": WriteLatent(),
    "latent_attention": LatentAttention(),
    "expanded_attention": ExpandedAttention(),
}
