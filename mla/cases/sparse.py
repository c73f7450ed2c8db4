"""The kinds of ops that sparse attention adds: index keys, selections, and attention to a selection."""

# ruff: noqa: RUF012  # tables that nobody writes to

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch

from mla import cost
from mla.cache.formats import SCALE_BYTES, IndexFp8, index_codec
from mla.cases import stress
from mla.cases.case import DTYPES, KINDS, Normal, OpCase, generator
from mla.cases.kinds import (
    DEEPSEEK,
    TABLES,
    LatentAttention,
    OfBytes,
    OverPages,
    Reads,
    Stores,
    WritesSlots,
    over_bytes,
)
from mla.cases.memory import Tensors, poison
from mla.cases.varied import Call, Change, Pool, Queries
from mla.cost import Work
from mla.verify.op_oracle import Weights, attend_selected, spans_of, true_layer_norm, true_rotation
from mla.verify.places import Places
from mla.verify.selections import judge_selection, true_selection
from mla_backends.api import FusedOp, IndexerSpec, SegmentLengths

OF_KEYS = {"d": "head_dim", "r": "rope_head_dim"}
INDEXER = {"h": "num_heads", **OF_KEYS, "k": "topk"}
V32: Mapping[str, Any] = {"num_heads": 64, "head_dim": 128, "rope_head_dim": 64, "topk": 2048}
BLOCK = 64  # tokens that are selected together, where a selection is clustered
GROUPS = 16  # different keys of a request, where scores tie
RISE = 8.0  # of scores, as the last channel makes them, beside N(0, 1)
RANKED = 1 << 24  # numbers that are ranked at once to draw selections


# ------------------------------------------------------------------------------------------- selections


def _clustered(draw: torch.Generator, position: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Rank blocks of BLOCK tokens at random, and later tokens of a block higher: selections are runs."""
    blocks = torch.rand((len(seen), len(position) // BLOCK + 1), generator=draw)
    return blocks[:, position // BLOCK] + 1e-4 * (position % BLOCK) / BLOCK


# How selected tokens lie -> what ranks the tokens [t, s] of queries that see `seen` [t, 1] of them: scattered
# over all pages, what a window would show, runs, and what most ops choose among tokens that score the same.
SELECTIONS: Mapping[str, Callable[[torch.Generator, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "random": lambda draw, position, seen: torch.rand((len(seen), len(position)), generator=draw),
    "recent": lambda draw, position, seen: position.float().expand(len(seen), -1),
    "clustered": _clustered,
    "tied": lambda draw, position, seen: -position.float().expand(len(seen), -1),
}


@functools.lru_cache(maxsize=4)
def selection_of(case: OpCase) -> torch.Tensor:
    """Return what each query selects [T, k] int32: positions in its request, then -1.

    A query that sees s tokens selects min(k, s) of them, the highest ranked first; RANKED numbers are ranked
    at once. The tensor is kept for other calls of the case: copy it before a call may write to it.
    """
    topk, draw = case.spec.topk, generator(case.seed, "selection")
    parts = [torch.empty((0, topk), dtype=torch.int32)]
    for new, keys in zip(case.query_lens, case.kv_lens, strict=True):
        position, together = torch.arange(keys), max(1, RANKED // max(1, keys))
        for first in range(0, new, together):
            seen = (torch.arange(first, min(new, first + together)) + keys - new + 1).clamp_min(0)[:, None]
            rank = SELECTIONS[case.selection](draw, position, seen).masked_fill(position >= seen, -torch.inf)
            best = rank.topk(min(topk, keys), dim=1).indices
            chosen = best.masked_fill(best >= seen, -1).int()
            parts.append(torch.nn.functional.pad(chosen, (0, topk - chosen.shape[1]), value=-1))
    return torch.cat(parts)


@functools.lru_cache(maxsize=256)
def different(case: OpCase) -> int:
    """Return how many different tokens the queries of all requests select.

    A call must read each of these latents at least once: see `latent_attention_cost`.
    """
    parts = selection_of(case).split(case.query_lens)
    return sum(len(part[part >= 0].unique()) for part in parts)


def selected_keys(selection: torch.Tensor, spans: Iterable[tuple[int, int]]) -> torch.Tensor:
    """Return the selected keys [T, k] int64 among those of all requests, or -1."""
    first = torch.tensor([start for start, _ in spans], dtype=torch.int64)[:, None]
    return torch.where(selection < 0, -1, selection.long() + first)


# ------------------------------------------------------------------------------------------- index keys
class WriteIndexKey(WritesSlots):
    """The LayerNorm and rotation of index keys, to the slots of a cache.

    All D channels are normed, (k - mean) / sqrt(var + eps) * weight + bias; then the first R are rotated, and
    the others kept (class `DeepseekV32Indexer` of `transformers`).
    """

    spec, letters, pool, usual = IndexerSpec, OF_KEYS, Pool, V32
    title = "{q} tokens, page {page}, keys of {d}, {r} turned"
    operands = {"k": "T d", "weight": "d", "bias": "d", "cos_sin": "T r", "slots": "T"}
    results = {"key": "T d"}
    scalars = {"eps": float, "interleaved": bool}
    weights = ("weight", "bias")
    varied = ("k", "cos_sin")
    cached = "d"
    cost = staticmethod(cost.write_index_key_cost)

    def draw(self, case: OpCase, normal: Normal, rows: int) -> Tensors:
        d = case.spec.head_dim
        k = stress.spread(case, normal(rows, d) + 0.5, case.stress.size)  # a mean that the norm takes away
        weight, bias = normal(d) * case.stress.gain, normal(d, scale=0.5)
        return {"k": k, "weight": weight, "bias": bias, "cos_sin": case.angles(rows)}

    def truth(self, spec: Any, given: Mapping[str, Any], lengths: SegmentLengths) -> Tensors:
        key = true_layer_norm(*(given[name] for name in ("k", "weight", "bias", "eps")))
        turned = spec.rope_head_dim
        first = true_rotation(key[:, :turned], given["cos_sin"], given["interleaved"])
        return {"key": torch.cat((first, key[:, turned:]), dim=1)}

    def written(self, arguments: Mapping[str, Any]) -> Tensors:
        return {"key": super().written(arguments)["rows"]}


class OfIndexBytes(OfBytes):
    """Pages of bytes in which the values of all tokens come before their scales."""

    widths, find = ("head_dim",), staticmethod(index_codec)

    def by_token(self, cache: torch.Tensor) -> torch.Tensor:
        """Return the bytes of tokens [pages, page, D + 4]: codes, then the scale. A copy."""
        return IndexFp8(cache.shape[2] - SCALE_BYTES).rows(cache)

    def put(self, call: Call, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Write the bytes [n, D + 4] of tokens to slots [n], wherever in their pages these are."""
        cast("IndexFp8", self.codec(call.case.spec)).put(call.arguments["cache"], slots, rows)


class StoredIndexKey(OfIndexBytes, Stores, WriteIndexKey):
    """A write of index keys to pages of bytes."""

    def offer(self, call: Call, results: Tensors) -> None:
        cache, slots = call.arguments["cache"], call.arguments["slots"]
        self.put(call, slots, poison(cache.new_empty((len(slots), cache.shape[2]))))


# -------------------------------------------------------------------------------------------- selecting
class Selecting(Queries):
    """Queries of an indexer, with their weights: those of all heads of a token are replaced together.

    Keys change signs once per pass, per column, with those of queries.
    """

    most = 16

    @property
    def together(self) -> int:  # type: ignore[override]
        return int(self.case.spec.num_heads)

    def _true(self) -> Tensors:
        """Return what judges the selections of all tokens and alternatives: see `true_selection`."""
        case, heads, spans = self.case, self.together, self.case.spans
        spans = spans + [spans[home] for home in self.homes for _ in range(self.choices - 1)]
        q, weights = (self.given[name].unflatten(0, (-1, heads)) for name in ("q", "weights"))
        keys = self.entry.keys(case.spec, self.given)
        return true_selection(q, weights, cast("Any", keys), spans, case.spec.topk, case.sizes["L"])

    def turned(self, signs: Tensors) -> Tensors:
        return {"q": signs["keys"]}

    def expected(self, change: Change, name: str) -> torch.Tensor:
        tokens = change.rows[0].view(-1, self.together)[:, 0] // self.together
        return self.truth[name].index_select(0, tokens)


class SelectLatents(OverPages):
    """The selection of tokens by their scores; among equals any will do.

    Token s scores ``sum over h of weights[t, h] * max(0, q[t, h] . key[s])`` for query t (DeepSeek-V3.2's
    report, section 2.1). An op is held to `out`, or to `out_in_bf16` if it compares rounded scores.
    """

    spec, letters, pool, usual = IndexerSpec, INDEXER, Selecting, V32
    title = "q {q} kv {kv}, top {k}, page {page}, {h} heads of {d}"
    operands = {"q": "T h d", "weights": "T h", **TABLES, "out": "T k"}
    results = {"out": "T k", "out_in_bf16": "T k"}  # of ops that compare scores in fp32, in bf16
    truths = {"reach": "T L", "rival": "T k+1", "floor": "T k+1"}
    dtypes = {**DTYPES, "out": torch.int32, "out_in_bf16": torch.int32}
    varied = ("q", "weights")
    cached = "d"
    cost = staticmethod(cost.select_latents_cost)

    def draw(self, case: OpCase, normal: Normal, rows: int) -> Tensors:
        """Draw q and keys from N(0, 1), and weights as a layer scales them, by (h d)^-0.5.

        "recent" and "clustered": the last channel of keys and queries makes the scores of such tokens rise,
        and weights are positive. "tied": keys repeat every GROUPS tokens.
        """
        spec, (first, count) = case.spec, case.requests_of_keys
        q, keys = normal(rows, spec.head_dim), normal(sum(case.kv_lens), spec.head_dim)
        weights = normal(rows).float() * (spec.num_heads * spec.head_dim) ** -0.5
        place = torch.arange(len(keys)) - first
        if case.selection == "tied":
            keys = keys[first + place % GROUPS]
        elif case.selection != "random":
            block = (
                normal(len(keys))[first + place // BLOCK] if case.selection == "clustered" else place / count
            )
            keys[:, -1], q[:, -1] = (RISE * block).to(keys.dtype), RISE
            weights = weights.abs()
        weights = weights.abs() if case.stress.aimed else weights
        return {"q": stress.queries(case, q, keys[:, None]), "keys": keys, "weights": weights}

    def truth(self, spec: Any, given: Mapping[str, Any], lengths: SegmentLengths) -> Tensors:
        parts = given["q"], given["weights"], self.keys(spec, given)
        return true_selection(*parts, spans_of(lengths), spec.topk, max(1, *lengths.kv_lens))

    def keys(self, spec: Any, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the keys [K, d]."""
        return given["keys"]

    def fault(
        self, name: str, result: torch.Tensor, truth: Tensors, *, places: Places | None = None, **known: Any
    ) -> tuple[float, str]:
        return judge_selection(result, truth, places, in_bf16=name == "out_in_bf16")

    def judged(self, op: FusedOp) -> list[str]:
        return ["out_in_bf16" if op.scores_in_bf16 else "out"]

    def written(self, arguments: Mapping[str, Any]) -> Tensors:
        return dict.fromkeys(self.results, arguments["out"])

    def offer(self, call: Call, results: Tensors) -> None:
        call.arguments["out"] = results[call.written[0]]


class SelectStored(OfIndexBytes, Reads, SelectLatents):
    """The same over pages of bytes."""

    def place(self, call: Call) -> None:
        """Lay tokens into the slots of the cache, row by row, and split those pages that hold any."""
        super().place(call)
        assert call.pages is not None
        cache, order = call.arguments["cache"], call.pages.order.to(call.device)
        slots = order[:, None] * cache.shape[1] + torch.arange(cache.shape[1], device=call.device)
        self.put(call, slots.flatten(), cache[order].flatten(0, 1))


# -------------------------------------------------------------------------------------- sparse attention
class Selected(Queries):
    """Queries that attend to a selection, the same for all heads and alternatives of a token."""

    def keys_of(self, token: int) -> torch.Tensor:
        chosen = selected_keys(self.given["selection"][token : token + 1], self.case.spans[token : token + 1])
        return chosen[chosen >= 0]


class SparseLatentAttention(LatentAttention):
    """Attention over the latents that each query selects."""

    letters, pool, usual = {**LatentAttention.letters, "k": "topk"}, Selected, {**DEEPSEEK, "topk": 2048}
    title = "q {q} kv {kv}, top {k}, {h} heads, page {page}, latents of {c} and {r}"
    operands = {**LatentAttention.operands, "selection": "T k"}
    cost = staticmethod(cost.latent_attention_cost)

    def draw(self, case: OpCase, normal: Normal, rows: int) -> Tensors:
        """Draw what attention needs, and a selection.

        Aimed queries look at keys that they select, so that an op which skips one of these is far off.
        """
        given = super().draw(case.but(aimed=False) if case.stress.aimed else case, normal, rows)
        given["selection"] = selection_of(case).clone()
        if case.stress.aimed:
            chosen = selected_keys(given["selection"], case.spans)
            given["q"] = stress.queries(case, given["q"], given["keys"][:, None], chosen)
        return given

    def work(self, case: OpCase) -> Work:
        """Return the work of the op, whose bytes count each selected latent once per request."""
        return self.cost(case.spec, case.query_lens, case.kv_lens, different(case))

    def attend(
        self, given: Mapping[str, Any], k: torch.Tensor, v: torch.Tensor, lengths: SegmentLengths,
        change: Weights = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        chosen = selected_keys(given["selection"], spans_of(lengths))
        return attend_selected(given["q"], k[:, 0], v[:, 0], chosen, given["softmax_scale"], change)


KINDS.update(
    write_index_key=WriteIndexKey(),
    select_latents=SelectLatents(),
    sparse_latent_attention=SparseLatentAttention(),
)
KINDS["write_index_key"].stored = StoredIndexKey()
KINDS["select_latents"].stored = SelectStored()
KINDS["sparse_latent_attention"].stored = over_bytes(Reads, SparseLatentAttention)
