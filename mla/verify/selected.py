"""What a layer should do, in float64, row by row, given what it has cached and the selection that it made.

A row reads the keys that it selects and no others, so that a row of a long context costs little. Latents are
multiplied as they are cached: q . (W k) is (q W) . k, exactly the same in float64 but for its last digits.

Scores that are nearly the same may be selected either way, and each selection has another output. So a
forward is judged in four parts, each by what it was given: the rows that the indexer makes, and what a cache
of some format stores, by the layer's inputs; the selection, by these rows; and the output, by the inputs, the
selection and what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch

from mla.cache import LatentCache
from mla.cache.formats import Codec, given_back
from mla.cache.index_formats import IndexFp8
from mla.config import MLAConfig
from mla.layer.attention import MLA
from mla.layer.plan import is_sparse
from mla.verify.layer_oracle import (
    Held,
    Pair,
    State,
    _by_position,
    _gate,
    _latents,
    _norm,
    _project,
    _queries,
    _rotate,
    _turned,
    index_keys_of,
)
from mla.verify.places import Places, describe
from mla.verify.selections import judge_selection, true_selection
from mla.verify.tolerances import ALLOWED, CAP_SLACK, row_errors


class Cached(NamedTuple):
    """What one request has in the cache: of its history as given, and of its new tokens in float64."""

    kv: Sequence[torch.Tensor]  # [s, c], [t, c]
    pe: Sequence[torch.Tensor]  # [s, r], [t, r]

    def rows(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return kv [n, c] and pe [n, r] in float64 at positions [n] int64."""
        return _at(self.kv, positions), _at(self.pe, positions)


def _at(parts: Sequence[torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    """Return rows [n, w] in float64 of a history [s, w] and new rows [t, w], at positions [n] int64."""
    past, new = parts
    rows = new.new_empty(len(positions), new.shape[1])
    old = positions < len(past)
    rows[old] = past[positions[old]].double()
    rows[~old] = new[positions[~old] - len(past)]
    return rows


class SelectingLayer:
    """One layer in float64, on the host; its weights are taken as they are stored.

    `state` has the names of a checkpoint; of an indexer `indexer.wq_b`, `wk`, `k_norm` and `weights_proj`.
    Tokens come in any floating dtype, from any device, with their positions int64; results are float64.
    """

    def __init__(self, config: MLAConfig, state: State) -> None:
        self.config = config
        self._state = {name: weight.cpu().double() for name, weight in state.items()}

    def latents(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what tokens [t, d] at positions [t] are cached as: kv [t, c] and pe [t, r]."""
        return _latents(self.config, self._state, hidden.cpu().double(), positions)

    def index_keys(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the index keys [t, D] of tokens [t, d] at positions [t]."""
        return index_keys_of(self.config, self._state, hidden.cpu().double(), positions)

    def index_queries(
        self, hidden: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `select_latents` is to be given for tokens [t, d]: q [t, H, D] and weights [t, H].

        Queries are wq_b of the normed query latent, their first r channels rotated. Weights are weights_proj
        of the tokens times (H D)^-0.5, the factor that DeepSeek-V3.2 puts on scores.
        """
        config, state, rows = self.config, self._state, hidden.cpu().double()
        q_a = _norm(_project(state, "q_a_proj", rows), state["q_a_layernorm.weight"], config.rms_norm_eps)
        q = _project(state, "indexer.wq_b", q_a * config.q_latent_scale)
        weights = _project(state, "indexer.weights_proj", rows) * config.index_scale
        return _turned(config, q.unflatten(1, (config.index_n_heads, -1)), positions), weights

    def attended(
        self,
        hidden: torch.Tensor,  # [n, d]
        positions: torch.Tensor,  # [n]
        cached: Cached,
        selection: torch.Tensor | None = None,  # [n, topk], -1 behind the last; None: all that is seen
        held: Held | None = None,
    ) -> torch.Tensor:
        """Return the layer's output [n, d] for tokens of one request.

        The softmax is over the selected keys alone, with the scale of dense attention, and over those at
        positions that are `held`, if not all are; without any, attention is 0.
        """
        config, rows = self.config, hidden.cpu().double()
        h, nope = config.num_attention_heads, config.qk_nope_head_dim
        w_uk, w_uv = self._state["kv_b_proj.weight"].unflatten(0, (h, -1)).split((nope, config.v_head_dim), 1)
        q = _queries(config, self._state, rows) * _by_position(config, positions)
        latent_q = torch.einsum("nhd,hdc->nhc", q[..., :nope], w_uk)
        q_pe = _rotate(config, q[..., nope:], positions)
        latent_out = torch.zeros_like(latent_q)
        sinks = self._state["sinks"][:, None] if config.sink_logits else latent_q.new_zeros(h, 0)
        for row, position in enumerate(positions.tolist()):
            chosen = torch.arange(position + 1) if selection is None else selection[row].cpu().long()
            chosen = chosen[(chosen >= 0) if held is None else held(chosen)]
            kv, pe = cached.rows(chosen)
            logits = (latent_q[row] @ kv.T + q_pe[row] @ pe.T) * config.softmax_scale
            weights = torch.cat((logits, sinks), dim=1).softmax(-1)[:, : len(chosen)]
            latent_out[row] = weights @ kv
        heads = torch.einsum("nhc,hvc->nhv", latent_out, w_uv)
        if config.output_gate is not None:
            heads = heads / (1 + (-_gate(config, self._state, rows[None])[0]).exp())
        return _project(self._state, "o_proj", heads.flatten(1))


# ---------------------------------------------------------------------------------------------- judging
@dataclass(frozen=True)
class Taken:
    """What a forward has left in memory, on the host, and must be judged by.

    All of it is copied off the clock. `selection` is None where it attended all keys; `q` and `weights` are
    None, and there are no keys, of a layer without an indexer.
    """

    latents: tuple[Pair, ...] = ()  # per request kv [t, c] and pe [t, r], decoded; none of a plain cache
    selection: torch.Tensor | None = None  # [T, topk] int32
    q: torch.Tensor | None = None  # [T, H, D], what the scores are of
    weights: torch.Tensor | None = None  # [T, H] fp32
    keys: tuple[torch.Tensor, ...] = ()  # per request [t, D]: of all its tokens since the history
    in_bf16: bool = False  # whether scores are


def take(
    layer: MLA,
    cache: LatentCache,
    sequences: Sequence[int],
    query_lens: Sequence[int],
    history: Sequence[int],
    kv_lens: Sequence[int],
    number: int = 0,
) -> Taken:
    """Return what the last forward of a layer, the cache's `number`, has left: copies.

    Lengths are per request: new tokens of the forward, tokens of the history, and all tokens after it.
    """
    selection, q, weights, in_bf16 = layer.selection, None, None, False
    keys, latents = list[torch.Tensor](), list[Pair]()
    if indexed := layer.config.index_n_heads > 0:
        views = layer.step.views.indexed(sum(query_lens))
        q, weights = (part.to("cpu", copy=True) for part in (views.q, views.weights))
        in_bf16 = layer.ops["select_latents"].op.scores_in_bf16
    for sequence, past, end in zip(sequences, history, kv_lens, strict=True):
        if indexed:
            rows = cast("torch.Tensor", cache.read_index(sequence, number, past))
            keys.append(rows[: end - past].cpu())
        if cache.cache_format:
            kv, pe = (part[: end - past].cpu() for part in cache.read(sequence, number, past))
            latents.append((kv, pe))
    copied = None if selection is None else selection.to("cpu", copy=True)
    return Taken(tuple(latents), copied, q, weights, tuple(keys), in_bf16)


class Past(NamedTuple):
    """The history of one request, as the cache gives it back."""

    kv: torch.Tensor  # [s, c]
    pe: torch.Tensor  # [s, r]
    keys: torch.Tensor  # [s, D] of an indexer; of a layer without one, anything


@dataclass(frozen=True)
class Judged:
    """Some rows of one forward: what they should be, given the selection, and what is wrong before them.

    `reason` is "" where the indexer's rows and the selection are right; the output is for the caller.
    """

    expected: torch.Tensor  # [n, d] float64
    places: Places  # [n]
    ratio: float = 0.0  # the largest error over its bound
    reason: str = ""


@dataclass(frozen=True)
class SelectionJudge:
    """Judges forwards of one layer by what they left; `dtype` is the layer's.

    Only positions that are `held` are attended, and cached.
    """

    truth: SelectingLayer
    dtype: torch.dtype
    codec: Codec | None = None  # of the cache; None: plain
    index_codec: IndexFp8 | None = None
    held: Held | None = None

    def judge(
        self,
        query_lens: Sequence[int],
        past: Sequence[Past],
        new: Sequence[torch.Tensor],  # per request [t, d]: all tokens since its history, in any dtype
        taken: Taken | None,  # None: nothing was left
        rows: torch.Tensor,  # [n] int64: which of the forward's rows are judged
    ) -> Judged:
        """Judge rows of a forward of `query_lens` new tokens, request by request.

        The output is expected for the selection that was made, so that a wrong selection is not blamed on
        attention, and the other way round.
        """
        kv_lens = [len(old.kv) + len(tokens) for old, tokens in zip(past, new, strict=True)]
        places = Places.new_tokens(query_lens, kv_lens).of(rows)
        expected = torch.zeros(len(rows), self.truth.config.hidden_size, dtype=torch.float64)
        dense = taken is None or taken.selection is None
        if taken is None or (dense and is_sparse(self.truth.config, query_lens, kv_lens)):
            return Judged(expected, places, reason="more tokens were attended than may be selected")
        faults = [(0.0, "")]
        for request in places.request.unique().tolist():
            indices = (places.request == request).nonzero()[:, 0]
            part = _Part(self, request, past[request], new[request], taken, rows[indices], places.of(indices))
            expected[indices] = part.expected()
            faults += part.faults()
        reason = next((said for _, said in faults if said), "")
        return Judged(expected, places, max(ratio for ratio, _ in faults), reason)


@dataclass
class _Part:
    """The judged rows of one request in one forward.

    `hidden` [n, d] are their tokens, `positions` [t] int64 those of all new tokens of the request,
    `selection` [n, topk] what they selected.
    """

    judge: SelectionJudge
    request: int
    past: Past
    new: torch.Tensor  # [t, d], of this forward and of those before it since the history
    taken: Taken
    rows: torch.Tensor  # [n] int64, of the forward
    places: Places  # [n]

    def __post_init__(self) -> None:
        count = len(self.past.kv)
        self.hidden = self.new[self.places.position - count]
        self.positions = torch.arange(count, count + len(self.new))
        selection = self.taken.selection
        self.selection = None if selection is None else selection[self.rows]

    def expected(self) -> torch.Tensor:
        """Return the outputs [n, d] in float64, given the selection."""
        truth, (kv, pe, _) = self.judge.truth, self.past
        if self.judge.codec is None:
            new_kv, new_pe = truth.latents(self.new, self.positions)
        else:
            new_kv, new_pe = map(self._spread, self.taken.latents[self.request])
        cached, chosen = Cached((kv, new_kv), (pe, new_pe)), self.selection
        if chosen is not None:  # what is wrong with it is said by itself
            chosen = chosen.masked_fill(chosen > self.places.position[:, None], -1)
        return truth.attended(self.hidden, self.places.position, cached, chosen, self.judge.held)

    def _held(self) -> torch.Tensor:
        """Return which of all new tokens are here, bool [t]."""
        held = self.judge.held
        return torch.ones(len(self.new), dtype=torch.bool) if held is None else held(self.positions)

    def _spread(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows [t, w] in float64 of all new tokens, zeros for those that are not here."""
        spread = torch.zeros(len(self.new), rows.shape[1], dtype=torch.float64)
        spread[self._held()] = rows.double()
        return spread

    def faults(self) -> Iterator[tuple[float, str]]:
        """Yield errors over their bounds, and what is wrong: of the indexer's rows, and of the selection."""
        truth, taken, dtype = self.judge.truth, self.taken, self.judge.dtype
        yield from self._latent_faults()
        if taken.q is None or taken.weights is None:  # the selection is another layer's
            return
        keys, true_keys = taken.keys[self.request], truth.index_keys(self.new, self.positions)
        beside, codec = torch.zeros(len(keys), dtype=torch.float64), self.judge.index_codec
        if codec is not None:
            beside = row_errors(codec.given_back(true_keys.float()), true_keys)
        yield _row_fault(f"index keys of request {self.request}", keys, true_keys, dtype, beside=beside)
        if self.selection is None:
            return
        q, weights = truth.index_queries(self.hidden, self.places.position)
        given = taken.q[self.rows], taken.weights[self.rows]
        yield _row_fault("index queries", given[0], q, dtype, self.places)
        yield _row_fault("index weights", given[1], weights, torch.float32, self.places)
        whole = torch.cat((self.past.keys, keys))
        spans = [(0, position + 1) for position in self.places.position.tolist()]
        true = true_selection(*given, whole, spans, self.selection.shape[1], len(whole))
        yield judge_selection(self.selection, true, self.places, taken.in_bf16)

    def _latent_faults(self) -> Iterator[tuple[float, str]]:
        """Yield the same of what a cache of some format has stored, which may err by the format's error."""
        codec = self.judge.codec
        if codec is None:
            return
        true = [part[self._held()] for part in self.judge.truth.latents(self.new, self.positions)]
        near = given_back(codec, *(part.float() for part in true))
        parts = zip(("latents", "keys"), self.taken.latents[self.request], true, near, strict=True)
        for name, stored, exact, rounded in parts:
            if not stored.numel():
                continue
            what, beside = f"cached {name} of request {self.request}", row_errors(rounded, exact)
            yield _row_fault(what, stored, exact, self.judge.dtype, beside=beside)


def _row_fault(
    what: str,
    actual: torch.Tensor,
    true: torch.Tensor,
    dtype: torch.dtype,
    places: Places | None = None,
    beside: torch.Tensor | float = 0.0,
) -> tuple[float, str]:
    """Return the largest relative error of rows [.., w] over what is allowed, and what is wrong.

    The norm of the error over that of the row may be CAP_SLACK * ALLOWED[dtype].whole + `beside`; NaN is
    infinitely wrong.
    """
    bound = CAP_SLACK * ALLOWED[dtype].whole + beside
    ratios = row_errors(actual.double(), true).nan_to_num(nan=torch.inf) / bound
    bad, worst = ratios > 1, ratios.max().item()
    if worst <= 1:
        return worst, ""
    where = describe(bad, places, int(ratios.argmax()))
    return worst, f"{int(bad.sum())} of {bad.numel()} rows of its {what} are wrong: {where}"
