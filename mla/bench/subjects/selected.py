"""Layers that are judged by what they left in memory: by their own selection, and the codes that they stored.

Scores that are nearly the same may be selected either way, and numbers near a border stored as either code;
each has another output. So of every forward that is kept, four things are judged, each by what it was given:
the rows that an indexer makes, and what a cache of some format stores, by the layer's inputs; the selection,
by these rows; and the output, by the inputs, the selection and what is stored.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from mla.bench.subjects.base import Outputs, Taken
from mla.bench.subjects.inputs import Inputs, Turn
from mla.bench.subjects.layer import MlaLayer
from mla.cache.formats import Codec, given_back
from mla.cache.ragged_batch import RaggedBatch
from mla.config import MLAConfig
from mla.cost import latent_attention_flops, parameters
from mla.verify.layer_check import Checker, Forward, Poison
from mla.verify.layer_oracle import Held, State
from mla.verify.places import Places, describe
from mla.verify.selected import Cached, SelectingLayer
from mla.verify.selections import judge_selection, true_selection
from mla.verify.tolerances import (
    ALLOWED,
    CAP_SLACK,
    Bounds,
    layer_bounds,
    mean_over,
    row_errors,
    table_decides,
)
from mla.verify.verdict import Check

# What the oracle may compute for a forward. Beyond that, it judges a random choice of rows, and at least so
# many.
ROWS_FLOPS, ROWS = 4e10, 8

_random = random.SystemRandom()  # what is judged is not known before


class SelectedLayer(MlaLayer):
    """Our layer with an indexer, over a cache that has index pages.

    Of each forward that is kept, it also keeps what the indexer wrote. The index pages are poisoned as those
    of latents are, so that a stale or missing key shows in the selection.
    """

    def _load_history(self, inputs: Inputs) -> None:
        """Load latents and index keys of the history, and prepare the poison of index pages."""
        for sequence, (kv, pe), index in zip(self._sequences, inputs.history, inputs.index, strict=True):
            self._cache.load(sequence, kv, pe, index=index)
        self._pages = list(self._cache.pages)
        nan_safe = self.layer.ops["select_latents"].op.nan_safe_tail
        what = self._cache, self._sequences, self.scenario.final_lens, nan_safe
        self._index_poison = Poison(*what, self._cache.index_pages)

    def begin(self, number: int) -> Turn:
        self._index_poison.apply()
        return super().begin(number)

    def clear_new(self, batch: RaggedBatch) -> None:
        """Fill the slots of a batch's new tokens with NaN, in the index pages as well."""
        super().clear_new(batch)
        self._cache.index_pages[0].flatten(0, 1).index_fill_(0, batch.slots, torch.nan)

    def _run(self, batch: RaggedBatch, hidden: torch.Tensor, outs: list[torch.Tensor]) -> None:
        self.layer(hidden, batch, self._pages[0], self._cache.index_pages[0], out=outs[0])

    def take_now(self, query_lens: Sequence[int], history: Sequence[int], kv_lens: Sequence[int]) -> Taken:
        """Return what the last forward has left, with the index keys from the history to `kv_lens`."""
        views = self.layer.step.views.indexed(sum(query_lens))
        selection, rows = self.layer.selection, self._cache.index_pages[0].flatten(0, 1)
        return replace(
            super().take_now(query_lens, history, kv_lens),
            selection=None if selection is None else selection.to("cpu", copy=True),
            q=views.q.to("cpu", copy=True),
            weights=views.weights.to("cpu", copy=True),
            keys=tuple(rows.index_select(0, new).cpu() for new in self._new_slots(history, kv_lens)),
            in_bf16=self.layer.ops["select_latents"].op.scores_in_bf16,
        )


@dataclass
class Judged:
    """One forward: its output with what that should be, and what is wrong with what came before.

    `reason` is "" where the indexer's rows and the selection are right; the output is judged apart.
    """

    forward: Forward
    ratio: float = 0.0  # the largest error over its bound
    reason: str = ""


@dataclass
class TakenChecker:
    """Judges forwards of a layer by what they left in memory, for any turn of `inputs`.

    `make_reference` returns the loaded layer whose error bounds that of fused ops; it runs once, if needed.
    Only positions that are `held` are attended.
    """

    truth: SelectingLayer
    dtype: torch.dtype
    inputs: Inputs  # with the history as the cache gives it back
    make_reference: Callable[[], MlaLayer]
    codec: Codec | None = None
    held: Held | None = None
    typical: float | None = None  # error of the reference, once it has run

    def of(self, inputs: Inputs, count: int) -> TakenChecker:
        """Return a checker of passes over other inputs, within the same bounds."""
        return replace(self, inputs=inputs.stored(self.codec))

    def check_pass(self, outputs: Outputs, number: int, held: bool, taken: dict[int, Taken]) -> Check:
        """Judge the outputs of pass `number`, and what was taken; `held`: also to the reference's error."""
        return self._verdict([judged for _, judged in self.judged(outputs, number, taken)], held)

    def on_lengths(
        self, query_lens: Sequence[int], kv_lens: Sequence[int], out: torch.Tensor, taken: Taken
    ) -> Check:
        """Judge the outputs [t, d] of the first rows of a plain pass, run as a batch of other lengths."""
        hidden = self.inputs.hidden[0, : len(out)]
        past = [length - new for length, new in zip(kv_lens, query_lens, strict=True)]
        return self._verdict([self._judge(out, [hidden], query_lens, past, taken, "new lengths")], held=False)

    def check_forwards(self, forwards: Iterable[Forward], held: bool) -> Check:
        """Judge outputs, each against what it should be."""
        listed = [replace(forward, step=step) for step, forward in enumerate(forwards)]
        if not listed:
            return Check(status="wrong", reason="there are no outputs to judge")
        expected = torch.stack([forward.expected for forward in listed])
        bounds = partial(self._bounds, held and not table_decides(self.dtype), expected)
        return _Bounded(expected, self.dtype, lambda: expected, bounds=bounds).check_forwards(listed, held)

    def judged(self, outputs: Outputs, number: int, taken: dict[int, Taken]) -> Iterator[tuple[int, Judged]]:
        """Yield the forwards of pass `number` by index.

        A step of decoding is judged from the new tokens of all steps before it; another forward by its own
        alone.
        """
        scenario = self.inputs.scenario
        decode = scenario.mode == "decode"
        for index, out in sorted(outputs.items()):
            steps = range(index + 1) if decode else [index]
            hidden = [self.inputs.forward(number, step)[0] for step in steps]
            where = f"{'step' if decode else 'forward'} {index}"
            yield (
                index,
                self._judge(out, hidden, scenario.query_lens, scenario.history, taken.get(index), where),
            )

    def forwards(
        self, outputs: Outputs, number: int, taken: dict[int, Taken]
    ) -> Iterator[tuple[int, Forward]]:
        """Yield the forwards of pass `number` by index, each with what its output should be."""
        return ((index, judged.forward) for index, judged in self.judged(outputs, number, taken))

    def _verdict(self, judged: Sequence[Judged], held: bool) -> Check:
        """Return the first reason of any forward, or else the verdict on all outputs."""
        wrong = next((part.reason for part in judged if part.reason), "")
        if wrong:
            return Check(status="wrong", reason=wrong)
        check = self.check_forwards([part.forward for part in judged], held)
        if check.error_ratio is not None:
            check.error_ratio = max([check.error_ratio, *(part.ratio for part in judged)])
        return check

    def _bounds(self, held: bool, expected: torch.Tensor) -> Bounds:
        known = torch.full(expected.shape[:-1], self._typical(), dtype=torch.float64) if held else None
        return layer_bounds(known, expected, self.dtype)

    def _typical(self) -> float:
        """Return the relative error of the reference's first forward, judged by its own selection."""
        if self.typical is None:
            reference = self.make_reference()
            reference.before(0)
            reference.step(0)
            reference.after(0)
            forward = next(reference.forwards(self))[1]
            errors = row_errors(forward.found, forward.expected)
            self.typical = mean_over(errors, forward.expected.norm(dim=-1))
        return self.typical

    def _judge(
        self,
        out: torch.Tensor,  # [T, d]
        hidden: Sequence[torch.Tensor],  # [T, d] of each forward since the history, this one last
        query_lens: Sequence[int],
        history: Sequence[int],  # how much of it there is
        taken: Taken | None,
        where: str,
    ) -> Judged:
        """Judge some rows of one forward, request by request; a NaN or a missing selection is a reason.

        The output [n, d] is expected for the selection that was made, so that a wrong selection is not blamed
        on attention, and the other way round.
        """
        kv_lens = [past + len(hidden) * new for past, new in zip(history, query_lens, strict=True)]
        rows = self._rows(query_lens, kv_lens)
        places = Places.new_tokens(query_lens, kv_lens).of(rows)
        expected = torch.zeros(len(rows), out.shape[1], dtype=torch.float64)
        forward = Forward(0, out[rows], expected, where, lambda: places)
        selects = self.truth.config.index_n_heads > 0 and max(kv_lens) > self.truth.config.index_topk
        if taken is None or (selects and taken.selection is None):
            return Judged(forward, reason=f"{where} attended more tokens than it may select")
        faults = [(0.0, "")]
        for request, past in enumerate(history):
            own = (places.request == request).nonzero()[:, 0]
            if len(own):
                new = torch.cat([part.split(list(query_lens))[request] for part in hidden])
                part = _Part(self, request, past, new, taken, rows[own], places.of(own))
                expected[own] = part.expected()
                faults += part.faults()
        reason = next((f"{said} ({where})" for _, said in faults if said), "")
        return Judged(forward, max(ratio for ratio, _ in faults), reason)

    def _rows(self, query_lens: Sequence[int], kv_lens: Sequence[int]) -> torch.Tensor:
        """Return the rows of a forward that are judged: all, or a random choice of many, in order."""
        config, count = self.truth.config, sum(query_lens)
        flops = 2 * parameters(config) + 2 * config.index_n_heads * config.index_head_dim * max(kv_lens)
        keys = config.index_topk if config.index_n_heads else max(kv_lens)
        flops += latent_attention_flops(
            config.num_attention_heads, keys, config.kv_lora_rank, config.qk_rope_head_dim
        )
        most = max(ROWS, int(ROWS_FLOPS / flops))
        return torch.tensor(sorted(_random.sample(range(count), min(count, most))))


def taken_checker(
    config: MLAConfig,
    dtype: torch.dtype,
    state: State,
    inputs: Inputs,
    make_reference: Callable[[], MlaLayer],
    codec: Codec | None,
    held: Held | None = None,
) -> TakenChecker:
    """Return what judges a layer with these weights by what it left in memory."""
    truth = SelectingLayer(config, state)
    return TakenChecker(truth, dtype, inputs.stored(codec), make_reference, codec, held)


@dataclass
class _Part:
    """The judged rows of one request in one forward.

    `hidden` [n, d] are their tokens, `positions` [t] int64 those of all new tokens of the request,
    `selection` [n, topk] what they selected.
    """

    checker: TakenChecker
    request: int
    past: int  # tokens of history
    new: torch.Tensor  # [t, d], of this forward and of those before it in the pass
    taken: Taken
    rows: torch.Tensor  # [n] int64, of the forward
    places: Places  # [n]

    def __post_init__(self) -> None:
        self.hidden = self.new[self.places.position - self.past]
        self.positions = torch.arange(self.past, self.past + len(self.new))
        selection = self.taken.selection
        self.selection = None if selection is None else selection[self.rows]

    def expected(self) -> torch.Tensor:
        """Return the outputs [n, d] in float64, given the selection."""
        checker = self.checker
        kv, pe = (part[: self.past] for part in checker.inputs.history[self.request])
        if checker.codec is None:
            new_kv, new_pe = checker.truth.latents(self.new, self.positions)
        else:
            new_kv, new_pe = map(self._spread, self.taken.latents[self.request])
        cached, chosen = Cached((kv, new_kv), (pe, new_pe)), self.selection
        if chosen is not None:  # what is wrong with it is said by itself
            chosen = chosen.masked_fill(chosen > self.places.position[:, None], -1)
        return checker.truth.attended(self.hidden, self.places.position, cached, chosen, checker.held)

    def _held(self) -> torch.Tensor:
        """Return which of all new tokens are here, bool [t]."""
        held = self.checker.held
        return torch.ones(len(self.new), dtype=torch.bool) if held is None else held(self.positions)

    def _spread(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows [t, w] in float64 of all new tokens, zeros for those that are not here."""
        spread = torch.zeros(len(self.new), rows.shape[1], dtype=torch.float64)
        spread[self._held()] = rows.double()
        return spread

    def faults(self) -> Iterator[tuple[float, str]]:
        """Yield errors over their bounds, and what is wrong: of the indexer's rows, and of the selection."""
        checker, taken = self.checker, self.taken
        yield from self._latent_faults()
        if not checker.truth.config.index_n_heads:
            return
        assert taken.q is not None
        assert taken.weights is not None
        keys, true_keys = taken.keys[self.request], checker.truth.index_keys(self.new, self.positions)
        yield _row_fault(f"index keys of request {self.request}", keys, true_keys, checker.dtype)
        if self.selection is None:
            return
        q, weights = checker.truth.index_queries(self.hidden, self.places.position)
        given = taken.q[self.rows], taken.weights[self.rows]
        yield _row_fault("index queries", given[0], q, checker.dtype, self.places)
        yield _row_fault("index weights", given[1], weights, torch.float32, self.places)
        whole = torch.cat((checker.inputs.index[self.request][: self.past], keys))
        spans = [(0, position + 1) for position in self.places.position.tolist()]
        true = true_selection(*given, whole, spans, self.selection.shape[1], len(whole))
        yield judge_selection(self.selection, true, self.places, taken.in_bf16)

    def _latent_faults(self) -> Iterator[tuple[float, str]]:
        """Yield the same of what a cache of some format has stored, which may err by the format's error."""
        checker, codec = self.checker, self.checker.codec
        if codec is None:
            return
        true = [part[self._held()] for part in checker.truth.latents(self.new, self.positions)]
        near = given_back(codec, *(part.float() for part in true))
        parts = zip(("latents", "keys"), self.taken.latents[self.request], true, near, strict=True)
        for name, stored, exact, rounded in parts:
            if not stored.numel():
                continue
            what, beside = f"cached {name} of request {self.request}", row_errors(rounded, exact)
            yield _row_fault(what, stored, exact, checker.dtype, beside=beside)


def _row_fault(
    what: str,
    found: torch.Tensor,
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
    ratios = row_errors(found.double(), true).nan_to_num(nan=torch.inf) / bound
    bad, worst = ratios > 1, ratios.max().item()
    if worst <= 1:
        return worst, ""
    where = describe(bad, places, int(ratios.argmax()))
    return worst, f"{int(bad.sum())} of {bad.numel()} rows of its {what} are wrong: {where}"


@dataclass
class _Bounded(Checker):
    """Holds forwards to bounds that are made when the first one is judged."""

    bounds: Callable[[], Bounds] | None = None

    def _bounds(self, held_to_reference: bool) -> Bounds:
        assert self.bounds is not None
        return self.bounds()
