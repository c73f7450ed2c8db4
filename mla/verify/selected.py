"""Whether a layer did what it should, given what it has cached and the selection that it made.

Scores that are nearly the same may be selected either way, and each selection has another output. So a
forward is judged in four parts, each by what it was given: the rows that the indexer makes, and what a cache
of some format stores, by the layer's inputs; the selection, by these rows; and the output, by the inputs, the
selection and what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch

from mla.cache import LatentCache
from mla.cache.formats import Codec, IndexFp8, given_back
from mla.layer.attention import MLA
from mla.layer.plan import is_sparse
from mla.verify.layer_oracle import Held, Pair, TrueLayer
from mla.verify.places import Places, describe
from mla.verify.selections import judge_selection, true_selection
from mla.verify.tolerances import ALLOWED, CAP_SLACK, row_errors


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

    def of(self, request: int, rows: torch.Tensor) -> Taken:
        """Return what was left of some rows [n] int64 of the forward, all of one request."""
        parts = {"selection": self.selection, "q": self.q, "weights": self.weights}
        chosen: dict[str, Any] = {name: part if part is None else part[rows] for name, part in parts.items()}
        one = slice(request, request + 1)
        return replace(self, latents=self.latents[one], keys=self.keys[one], **chosen)


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

    truth: TrueLayer
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
            part = past[request], new[request], taken.of(request, rows[indices]), places.of(indices)
            expected[indices], of_request = self._request(f"of request {request}", *part)
            faults += of_request
        reason = next((said for _, said in faults if said), "")
        return Judged(expected, places, max(ratio for ratio, _ in faults), reason)

    def _request(
        self, of: str, past: Past, new: torch.Tensor, taken: Taken, places: Places
    ) -> tuple[torch.Tensor, list[tuple[float, str]]]:
        """Return outputs [n, d] in float64 of rows of a request, given the selection; and all that is wrong.

        These are errors over their bounds, with reasons. What is in a cache of some format may err by the
        format's error as well.
        """
        truth, dtype, count, chosen = self.truth, self.dtype, len(past.kv), taken.selection
        positions = torch.arange(count, count + len(new))
        held: Any = slice(None) if self.held is None else self.held(positions)  # of all new tokens
        parts, faults = truth.latents(new, positions), list[tuple[float, str]]()
        if self.codec is not None:
            near = given_back(self.codec, *(part[held].float() for part in parts))
            pairs = zip(("latents", "keys"), parts, taken.latents[0], near, strict=True)
            for name, part, stored, rounded in pairs:
                exact = part[held].clone()
                part[held] = stored.double()  # of others nobody asks
                if stored.numel():
                    beside = row_errors(rounded, exact)
                    faults.append(_row_fault(f"cached {name} {of}", stored, exact, dtype, beside=beside))

        def cached(positions: torch.Tensor) -> Pair:
            old, rows = positions < count, [part.new_empty(len(positions), part.shape[1]) for part in parts]
            for of, kept, made in zip(rows, past, parts, strict=False):
                of[old], of[~old] = kept[positions[old]].double(), made[positions[~old] - count]
            return rows[0], rows[1]

        if chosen is not None:  # what is wrong with it is said by itself
            chosen = chosen.masked_fill(chosen > places.position[:, None], -1)
        hidden = new[places.position - count]
        outputs = truth.attended(hidden, places.position, cached, chosen, self.held)
        if taken.q is None or taken.weights is None:  # the selection is another layer's
            return outputs, faults
        (keys,), true_keys = taken.keys, truth.index_keys(new, positions)
        beside = true_keys.new_zeros(len(keys))
        if self.index_codec is not None:
            beside = row_errors(self.index_codec.given_back(true_keys.float()), true_keys)
        faults.append(_row_fault(f"index keys {of}", keys, true_keys, dtype, beside=beside))
        if taken.selection is not None:
            q, weights = truth.index_queries(hidden, places.position)
            faults.append(_row_fault("index queries", taken.q, q, dtype, places))
            faults.append(_row_fault("index weights", taken.weights, weights, torch.float32, places))
            whole = torch.cat((past.keys, keys))
            spans = [(0, position + 1) for position in places.position.tolist()]
            best = true_selection(taken.q, taken.weights, whole, spans, taken.selection.shape[1], len(whole))
            faults.append(judge_selection(taken.selection, best, places, taken.in_bf16))
        return outputs, faults


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
