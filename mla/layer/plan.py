"""`StepPlan`: how a batch goes through attention. Made on the host, once per batch, without a device sync."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from mla import cost
from mla.cache.ragged_batch import RaggedBatch, slots_at
from mla.config import MLAConfig
from mla.layer.ops import Choice, Ops
from mla.layer.workspace import Tokens
from mla_backends.api import BatchView, SegmentLengths
from mla_backends.upload import upload

# Bytes that the rebuilt keys and values of one round usually take at most.
WORKSPACE_BYTES = 256 << 20
# Roles of the ops that run by a batch's lengths where its queries attend a selection.
SPARSE_ROLES = ("sparse_latent_attention", "select_latents")


def rebuilt_bytes(config: MLAConfig, itemsize: int, keys: int) -> int:
    """Return the bytes of this many rebuilt keys: k, kv_b's output (v is part of it) and latents."""
    row = config.qk_head_dim + config.qk_nope_head_dim + config.v_head_dim
    return keys * (row * config.num_attention_heads + config.latent_dim) * itemsize


# --------------------------------------------------------------------------------------------- plan
@dataclass(frozen=True)
class Piece:
    """Queries of a round that attend its keys under one mask."""

    queries: slice  # of the group's tokens
    state: Any  # of the op
    merge: bool  # earlier rounds have already attended other keys for these queries


@dataclass(frozen=True)
class Round:
    """Context tokens that are expanded together."""

    slots: torch.Tensor  # [s] int64
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class AbsorbedGroup:
    """Requests that attend in latent space.

    A sparse group is the whole batch; `state` is then that of `sparse_latent_attention`.
    """

    tokens: Tokens
    cos_sin: torch.Tensor  # [t, r] fp32
    batch: BatchView
    state: Any
    role: str = "latent_attention"  # or "sparse_latent_attention", to a selection
    select: Any = None  # the state of `select_latents`, where that makes the selection

    @property
    def is_sparse(self) -> bool:
        """Whether queries attend a selection."""
        return self.role != "latent_attention"


@dataclass(frozen=True)
class ExpandedGroup:
    """Requests whose keys and values are rebuilt from the latent cache, in rounds."""

    tokens: Tokens
    cos_sin: torch.Tensor  # [t, r] fp32
    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class StepPlan:
    """At most one group per path; together they cover every token once."""

    cos_sin: torch.Tensor  # [T, r] fp32
    absorbed: AbsorbedGroup | None
    expanded: ExpandedGroup | None


def frozen_roles(plan: StepPlan) -> list[str]:
    """Return the roles whose state does not promise that a captured call follows lengths changed in place.

    Those of the absorbed path: an expanded one never does.
    """
    if (group := plan.absorbed) is None:
        return []
    states = {group.role: group.state, **({} if group.select is None else {"select_latents": group.select})}
    return [role for role, state in states.items() if not getattr(state, "graph_safe", False)]


def make_plan(
    config: MLAConfig,
    ops: Ops,
    cos_sin: torch.Tensor,  # [T, r] fp32, of the batch's positions
    batch: RaggedBatch,
    attention: str,
    workspace: int,
    selected: bool = False,
) -> StepPlan:
    """Split a batch by path and prepare each op once.

    A batch with a context beyond `config.index_topk`, or whose selection is given (`selected`), is attended
    absorbed and sparse; any other as if there were no indexer. One round rebuilds at most `workspace` bytes
    of keys and values; an op that cannot merge rounds gets a whole request. Raises `UnsupportedBatch`.
    """
    if selected or is_sparse(config, batch.query_lens, batch.kv_lens):
        return StepPlan(cos_sin, _sparse(ops, batch, cos_sin, selected), None)
    members = cost.by_path(config, batch.query_lens, batch.kv_lens, attention)
    return StepPlan(
        cos_sin=cos_sin,
        absorbed=_absorbed(ops, batch, members[cost.ABSORBED], cos_sin),
        expanded=_expanded(config, ops, batch, members[cost.EXPANDED], cos_sin, workspace),
    )


def is_sparse(config: MLAConfig, query_lens: Sequence[int], kv_lens: Sequence[int]) -> bool:
    """Return whether a batch attends a selection: some query's context is longer than that.

    Requests without new tokens do not count. Where no context is longer, all keys would be selected, and the
    batch runs as if there were no indexer.
    """
    topk = config.index_topk
    if not 0 < topk < max(kv_lens):
        return False
    return any(new and length > topk for new, length in zip(query_lens, kv_lens, strict=True))


def _sparse(ops: Ops, batch: RaggedBatch, cos_sin: torch.Tensor, selected: bool) -> AbsorbedGroup | None:
    """Prepare attention to a selection, and its making unless one is `selected`; None without tokens."""
    if not batch.num_tokens:
        return None
    roles = ("sparse_latent_attention",) if selected else SPARSE_ROLES
    states = [ops[role].prepare(batch) for role in roles]
    return AbsorbedGroup(slice(0, batch.num_tokens), cos_sin, batch, states[0], *roles[:1], *states[1:])


def check_lengths(
    config: MLAConfig,
    ops: Ops,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    page_size: int,
    attention: str,
) -> None:
    """Raise `UnsupportedBatch` for lengths that an op refuses, as planning a batch of them would."""
    if is_sparse(config, query_lens, kv_lens):
        for role in SPARSE_ROLES if config.index_n_heads else SPARSE_ROLES[:1]:
            ops[role].check_batch(query_lens, kv_lens, page_size)
        return
    members = cost.by_path(config, query_lens, kv_lens, attention)
    for path, role, pages in (
        (cost.ABSORBED, "latent_attention", page_size),
        (cost.EXPANDED, "expanded_attention", None),
    ):
        new = [query_lens[request] for request in members[path]]
        if sum(new):
            ops[role].check_batch(new, [kv_lens[request] for request in members[path]], pages)


def _absorbed(
    ops: Ops, batch: RaggedBatch, requests: Sequence[int], cos_sin: torch.Tensor
) -> AbsorbedGroup | None:
    tokens, part = _part(batch, requests)
    if part is None:
        return None
    angles = cos_sin if part is batch else cos_sin[tokens]
    return AbsorbedGroup(tokens, angles, part, ops["latent_attention"].prepare(part))


def _expanded(
    config: MLAConfig,
    ops: Ops,
    batch: RaggedBatch,
    requests: Sequence[int],
    cos_sin: torch.Tensor,
    workspace: int,
) -> ExpandedGroup | None:
    tokens, part = _part(batch, requests)
    if part is None:
        return None
    choice = ops["expanded_attention"]
    choice.check_batch(part.query_lens, part.kv_lens)
    limit = max(1, workspace // rebuilt_bytes(config, choice.spec.dtype.itemsize, 1))
    if not choice.op.writes_lse:  # it cannot merge parts of a request
        limit = max(limit, *(kv for new, kv in zip(part.query_lens, part.kv_lens, strict=True) if new))
    rounds = tuple(_round(part, choice, chunk) for chunk in _chunks(part, limit))
    return ExpandedGroup(tokens, cos_sin[tokens], rounds)


def _part(batch: RaggedBatch, requests: Sequence[int]) -> tuple[Tokens, RaggedBatch | None]:
    """Return where the requests' tokens are, and a batch of those requests; None when they have no tokens."""
    if sum(batch.query_lens[i] for i in requests) == 0:
        return slice(0, 0), None
    if len(requests) == len(batch.query_lens):
        return slice(0, batch.num_tokens), batch
    part = batch.subset(requests)
    spans = [(batch.cu_q_host[i], batch.cu_q_host[i + 1]) for i in requests]
    if all(left[1] == right[0] for left, right in pairwise(spans)):
        return slice(spans[0][0], spans[-1][1]), part
    index = torch.cat([torch.arange(*span, device="cpu") for span in spans])
    return upload(index, batch.device), part


class _Span(NamedTuple):
    """Keys [start, stop) of one request."""

    request: int
    start: int
    stop: int


def _chunks(batch: RaggedBatch, limit: int) -> Iterator[list[_Span]]:
    """Split the context into rounds of at most `limit` tokens: whole requests, or parts of a longer one."""
    together: list[_Span] = []
    for request, kv_len in enumerate(batch.kv_lens):
        if batch.query_lens[request] == 0:
            continue
        if together and sum(span.stop for span in together) + kv_len > limit:
            yield together
            together = []
        if kv_len > limit:
            yield from ([_Span(request, s, min(s + limit, kv_len))] for s in range(0, kv_len, limit))
        else:
            together.append(_Span(request, 0, kv_len))
    if together:
        yield together


def _round(batch: RaggedBatch, choice: Choice, spans: Sequence[_Span]) -> Round:
    """Resolve a round's slots, and its queries: those inside it (causal), then those after it."""
    table, size = batch.block_table_host, batch.page_size
    tokens = [(span.request * table.shape[1], torch.arange(*span[1:], device="cpu")) for span in spans]
    slots = upload(torch.cat([slots_at(table, *token, size) for token in tokens]), batch.device)
    inside, after, keys = zip(*(_seen(batch, span) for span in spans), strict=True)
    stop = batch.cu_q_host[spans[-1].request + 1] - after[-1]

    def piece(queries: slice, query_lens: tuple[int, ...], causal: bool) -> Piece:
        lengths = SegmentLengths(query_lens, keys, causal)
        return Piece(queries, choice.op.prepare(choice.spec, lengths), merge=spans[0].start > 0)

    pieces = [piece(slice(stop - sum(inside), stop), inside, True)] if any(inside) else []
    if after[-1]:  # of the part of a long request, which is alone
        pieces.append(piece(slice(stop, stop + after[-1]), after, False))
    return Round(slots, tuple(pieces))


def _seen(batch: RaggedBatch, span: _Span) -> tuple[int, int, int]:
    """Return how many of a request's queries are inside a span, and after it, and its keys."""
    query_len = batch.query_lens[span.request]
    past = batch.kv_lens[span.request] - query_len
    before, until = max(0, span.start - past), max(0, span.stop - past)
    return until - before, query_len - until, span.stop - span.start
