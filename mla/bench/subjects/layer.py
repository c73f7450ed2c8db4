"""Our layer, or N of them with cold weights as in a model, as an implementation; and its graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from time import perf_counter_ns as now_ns
from typing import Any

import torch

from mla.bench.subjects.base import KEPT, Facts, LayerImplementation, Left, Outputs, worst
from mla.bench.subjects.inputs import HistorySigns, Inputs, Turn
from mla.bench.subjects.setting import SPARE_PAGES, Setting
from mla.bench.workload.scenario import Scenario
from mla.cache import LatentCache
from mla.cache.ragged_batch import RaggedBatch
from mla.layer.attention import MLA
from mla.layer.plan import frozen_roles
from mla.parallel.layout import Share
from mla.verify.layer_check import Poison
from mla.verify.layer_oracle import State
from mla.verify.places import Places
from mla.verify.selected import Taken, take
from mla.verify.tolerances import BOUNDS, ROW_SLACK
from mla.verify.verdict import Check
from mla_backends import BackendError
from mla_backends.api import Backend
from mla_backends.errors import describe


class MlaLayer(LayerImplementation):
    """Our layer, with the backend's fused ops (`mla`) or without (`mla-reference`).

    Of `setting.layers` layers over one cache, each step is one extend, one plan, and a forward each of the
    same hidden states. Layer i computes what layer 0 computes, with channels rolled by i in two places: in
    the latent, inside the layer and its cache, and in the output. So one oracle serves all layers, yet a
    layer that uses another's weights or cache is wrong.

    Of each forward that is kept, it also keeps what is in memory, if that is what it is judged by: see
    `Taken`. A layer with an indexer may share its selection with those behind it. Index pages are poisoned as
    those of latents are, so that a stale or missing key shows in the selection.
    """

    batch: RaggedBatch  # the prepared one of a prefill
    make_layer: Callable[..., MLA] = MLA
    make_cache: Callable[..., LatentCache] = LatentCache
    share = Share(0, 1)  # of every request's tokens
    cache: LatentCache  # the scenario's, once it is loaded
    _sequences: list[int]

    def __init__(self, setting: Setting, state: State, name: str = "mla", ops: str | None = None) -> None:
        super().__init__(setting)
        self.name = name
        self.layers = [self._make_layer(ops, index) for index in range(setting.layers)]
        for index, layer in enumerate(self.layers):
            layer.load_state_dict(layer_state(state, index) if index else state, strict=not index)
        self.layer, self._takes = self.layers[0], setting.is_judged_after
        self.buffers = KEPT + 1 if self._takes else None
        self.held_to_reference = {*self.layer.ops.names().values()} != {"reference"}

    def _make_layer(self, ops: str | None, index: int) -> MLA:
        setting = self.setting
        layer = self.make_layer(
            setting.config.of_layer(index),
            backend=setting.backend,
            dtype=setting.dtype,
            attention=setting.attention,
            ops=ops or setting.ops,
            overrides=dict(setting.overrides),
            cache_format=setting.cache_format,
            index_format=setting.index_format,
        )
        if setting.weights is not None:
            layer.share_weights(setting.weights[index])
        return layer

    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        again = self.loaded(scenario)
        self.prepare_buffers(scenario, inputs, len(self.layers))
        if again:
            self._shrink()
            for sequence in reversed(self._sequences):  # then the same pages are taken, which a graph reads
                self.cache.truncate(sequence, 0)
        else:
            self.cache = self._make_cache(scenario)
            self._sequences = self.cache.new_sequences(len(scenario.query_lens))
        keys = inputs.index or [None] * len(self._sequences)
        for sequence, (kv, pe), index_keys in zip(self._sequences, inputs.history, keys, strict=True):
            for index in range(len(self.layers)):
                given = index_keys if index in self.cache.index_layers else None
                self.cache.load(sequence, kv.roll(index, 1), pe, layer=index, index=given)
        self._history = HistorySigns(self.cache, self._sequences)
        if not again:
            self._pages = list(self.cache.pages)
            self._index_pages = [self.cache.of_layer(index)[1] for index in range(len(self.layers))]
            what = self.cache, self._sequences, scenario.final_lens
            roles = ["latent_attention", *["select_latents"] * bool(self.setting.config.index_n_heads)]
            safe = [self.layer.ops[role].op.nan_safe_tail for role in roles]
            self._poisons = [Poison(*what, safe[place], of_index=bool(place)) for place in range(len(safe))]
        self.restore()

    def _make_cache(self, scenario: Scenario) -> LatentCache:
        size = self.setting.page_size
        pages = sum(-(-self.share.first(length) // size) for length in scenario.final_lens) + SPARE_PAGES
        return self.make_cache(
            self.setting.config,
            max_tokens=pages * size * self.share.world,
            page_size=size,
            num_layers=self.setting.layers,
            device=self.setting.device,
            dtype=self.setting.dtype,
            cache_format=self.setting.cache_format,
            index_format=self.setting.index_format,
            shuffle=self.setting.seed,
        )

    def restore(self, number: int = 0) -> None:
        self._shrink()
        self._taken: dict[int, list[Taken]] = {}  # by forward, of every layer
        super().restore(number)
        for poison in self._poisons:
            poison.apply()
        if self._prefills:
            self._plan()

    def take(self, turn: Turn) -> None:
        super().take(turn)
        self._history.take(turn.signs)

    def after(self, index: int) -> None:
        """Keep what a forward left in every layer, if it is among those that are judged by it."""
        super().after(index)
        if self._takes:
            kept = self._shelf.kept
            self._taken |= {index: self._take_all()} if index in kept else {}
            self._taken = {forward: self._taken[forward] for forward in kept}

    def take_now(self, query_lens: Sequence[int], history: Sequence[int], kv_lens: Sequence[int]) -> Taken:
        """Return what the last forward has left of all tokens from the history to `kv_lens`.

        Lengths are per request: new tokens of the forward, tokens of the history, and all tokens after it.
        """
        return take(self.layer, self.cache, self._sequences, query_lens, history, kv_lens)

    def _take_all(self) -> list[Taken]:
        """Return what every layer has left of a pass's forward.

        A layer that shares a selection is judged by what it was to attend, not by what it says of that.
        """
        scenario, kv_lens = self.scenario, [self.cache.length(sequence) for sequence in self._sequences]
        lengths = scenario.query_lens, scenario.history, kv_lens
        all_taken = [self.take_now(*lengths)]
        for number, layer in enumerate(self.layers[1:], 1):
            taken = take(layer, self.cache, self._sequences, *lengths, number)
            shares = taken.q is None
            all_taken.append(replace(taken, selection=all_taken[-1].selection) if shares else taken)
        return all_taken

    def _shrink(self, first: int = 0) -> None:
        """Undo the steps of the pass from `first` on, last pages first.

        So the free list and thus every pass's pages are the same.
        """
        scenario = self.scenario
        for step in reversed(range(first, scenario.inputs)):
            grown = zip(self._sequences, scenario.kv_lens(step), scenario.query_lens, strict=True)
            for sequence, length, new in reversed(list(grown)):
                if self.cache.length(sequence) > length - new:
                    self.cache.truncate(sequence, length - new)

    def _plan(self) -> None:
        """Prepare the batch that every prefill forward runs; its time is reported separately."""
        self.batch = self.extend()
        start = now_ns()
        self.layer.plan(self.batch)
        self._plan_ms: float | None = (now_ns() - start) / 1e6

    def ready(self, index: int) -> None:
        super().ready(index)
        self.outs = list(self.out)  # views, made before anything is timed
        if self._prefills:
            self.clear_new(self.batch)

    def clear_new(self, batch: RaggedBatch) -> None:
        """Overwrite what is cached of a batch's new tokens, which another forward may have written."""
        for poison in self._poisons:
            poison.clear(batch.slots)

    def step(self, index: int) -> None:
        self.forward(self.batch if self._prefills else self.extend(), self.x, self.outs)

    def extend(self, table_tokens: int = 0) -> RaggedBatch:
        """Make room for the next decode step and return its batch (`LatentCache.extend`)."""
        return self.cache.extend(self._sequences, self.scenario.query_lens, table_tokens=table_tokens)

    def forward(self, batch: RaggedBatch, hidden: torch.Tensor, outs: Sequence[torch.Tensor]) -> None:
        """Run the layers on any batch of the cache; each writes one of `outs` [T, d]."""
        selection = None
        parts = zip(self.layers, self._pages, self._index_pages, outs, strict=True)
        for layer, pages, index_pages, out in parts:
            layer(hidden, batch, pages, index_pages, selection if index_pages is None else None, out=out)
            selection = layer.selection

    def evidence(self, query_lens: tuple[int, ...], kv_lens: tuple[int, ...]) -> tuple[Taken, ...]:
        """Return what the outputs of the last forward, on these lengths, are judged by beside its inputs."""
        past = [length - new for length, new in zip(kv_lens, query_lens, strict=True)]
        return (self.take_now(query_lens, past, kv_lens),) if self._takes else ()

    def places(self, step: int) -> Places:
        """Return what the rows of a forward are, and in which pages."""
        size = self.cache.page_size
        pages = [self.cache.slots(sequence)[::size].cpu() // size for sequence in self._sequences]
        table = torch.nn.utils.rnn.pad_sequence(pages, batch_first=True)
        return Places.new_tokens(self.scenario.query_lens, self.scenario.kv_lens(step), table, size)

    def facts(self) -> Facts:
        cache = getattr(self, "cache", None)
        return Facts(
            cache_bytes=sum(held.nbytes for held in (cache.pages, cache.index_pages)) if cache else 0,
            weight_bytes=sum(layer.weight_bytes() for layer in self.layers),
            scratch_bytes=sum(layer.scratch_bytes() for layer in self.layers),
            plan_ms=getattr(self, "_plan_ms", None),
            ops=self.layer.ops.names(),
            remarks=self.layer.ops.remarks(),
        )

    def replace_ops(self, replace: Callable[[str, Any], Any]) -> None:
        """Put `replace(role, op)` in place of every op; called before `load`.

        Of several layers, "layer 3: " stands before the role.
        """

        def in_layer(index: int, role: str, op: Any) -> Any:
            return replace(f"layer {index}: {role}" if len(self.layers) > 1 else role, op)

        for index, layer in enumerate(self.layers):
            layer.replace_ops(partial(in_layer, index))

    def outputs(self) -> Outputs:
        return self._outputs(0)

    def _outputs(self, layer: int) -> Outputs:
        """Return the outputs [T, d] of a layer by forward, as layer 0 would have them."""
        by_forward = super().outputs().items()
        return {forward: rows[layer].roll(-layer, -1) if layer else rows[0] for forward, rows in by_forward}

    def left(self, layer: int = 0) -> Left:
        """Return what a layer left of the last pass to judge it by."""
        taken = {forward: by_layer[layer] for forward, by_layer in self._taken.items()}
        return Left(self.number, self._outputs(layer), taken, self.places)

    def check(self, checker: Any) -> Check:
        """Check every layer's outputs, and that its new latents are in its own part of the cache."""
        count = len(self.layers)
        checks = [checker.check_pass(self.left(index), self.held_to_reference) for index in range(count)]
        for index, check in enumerate(checks):
            if check.status == "ok" and index and not self._cached(index):
                check.status, check.reason = "wrong", "its latents are not in its part of the cache"
        index = worst(checks)
        if checks[index].reason and count > 1:
            checks[index].reason = f"layer {index}: {checks[index].reason}"
        return checks[index]

    def _cached(self, index: int) -> bool:
        """Return whether a layer cached the same as layer 0, rolled and up to rounding."""
        bound = ROW_SLACK * BOUNDS[self.setting.dtype]
        for sequence in self._sequences:
            pairs = (self.cache.read(sequence, layer=layer) for layer in (0, index))
            first, other = (torch.cat(pair, dim=1).float() for pair in pairs)
            rank = self.setting.config.kv_lora_rank
            other[:, :rank] = other[:, :rank].roll(-index, 1)
            errors = (other - first).norm(dim=1) / first.norm(dim=1)
            if not bool((errors <= bound).all()):  # NaN is not
                return False
        return True


# What is rolled in the weights of a layer behind the first, along which dimension: the latent's channels, of
# kv_a before the rotary ones, and those of the output.
ROLLED = {
    **dict.fromkeys(("kv_a_layernorm.weight", "o_proj.weight", "o_proj.bias"), 0),
    **dict.fromkeys(("kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias"), 0),
    "kv_b_proj.weight": 1,
}


def layer_state(state: State, index: int) -> dict[str, torch.Tensor]:
    """Return the weights of layer `index`, the rolled ones as copies."""
    rank, rolled = state["kv_a_layernorm.weight"].shape[0], dict(state)
    for name, dim in ROLLED.items():
        if name in state:
            size = state[name].shape[dim]
            count = size if name.startswith("o_proj") else rank
            channels, others = state[name].split((count, size - count), dim)
            rolled[name] = torch.cat((channels.roll(index, dim), others), dim)
    return rolled


# ------------------------------------------------------------------------------------------------- graphs


class NoGraph(Exception):
    """Raised with the reason why an implementation cannot be captured, as one clause."""


class CapturedForwards:
    """Our layer's forwards replayed from one device graph, driven as an implementation is.

    prefill: the forward on the prepared batch. decode: all steps of a pass. Its batch has fixed addresses and
    a block table as wide as the pass needs at most; planning is captured along with the forward. A replayed
    step is `extend`, `update_` of that batch, and the replay. Raises `NoGraph` if a replay would not follow
    the growing lengths.
    """

    def __init__(self, layer: MlaLayer, scenario: Scenario) -> None:
        self._layer, self._decode = layer, scenario.mode == "decode"
        self._bookkeeps = self._decode  # in a step
        self.out, self._max_tokens = torch.empty_like(layer.out), max(scenario.final_lens)
        self.method = "replay of one captured forward of the prepared batch"  # for the result
        if self._decode:
            self.method = "replay of one captured graph, its block table as wide as the pass needs"
            self._prepare_decode(scenario)
        else:
            layer.restore()
            layer.before(0)
            self._batch, self._hidden = layer.batch, layer.hidden[0]
            self._plan = layer.layer.plan(self._batch)  # kept alive, as the batch is: the graph reads it
        self._replay = capture(layer.setting.backend, self._work)  # of a decode the last step, the longest
        layer.restore()

    def _prepare_decode(self, scenario: Scenario) -> None:
        layer = self._layer
        _check_switches(layer, scenario)
        layer.layer.rotary.reserve(self._max_tokens)  # growing would move what the graph reads
        layer.restore()
        for _ in range(scenario.inputs):
            self._batch = layer.extend(self._max_tokens)
            _check_plan(layer, self._batch)
        layer.before(scenario.inputs - 1)
        self._hidden = layer.x.clone()

    def _work(self) -> None:
        if self._decode:
            self._batch.update_(self._batch)  # drops the plan, so that planning is captured too
        self._layer.forward(self._batch, self._hidden, list(self.out))

    def without_bookkeeping(self) -> CapturedForwards:
        """Return the same forwards for the device's clock: the host's part of a step is done before it."""
        alone = copy(self)
        alone._bookkeeps = False
        alone.method = f"{self.method}; bookkeeping of the host outside the timed region"
        return alone

    def restore(self, number: int = 0) -> None:
        """Restore the cache to the history, and select the inputs of pass `number`. Never timed."""
        self._layer.restore(number)
        table = self._batch.block_table_host
        if not self._decode and not torch.equal(self._layer.batch.block_table_host, table):
            raise RuntimeError("a restored cache handed out pages other than the captured ones.")

    def before(self, index: int) -> None:
        """Write the inputs of a forward to where its graph reads them, and poison its output. Never timed."""
        if self._decode and not self._bookkeeps:
            self._batch.update_(self._layer.extend(self._max_tokens))
        self.out.fill_(math.nan)
        self._layer.before(index)
        if self._decode:
            self._hidden.copy_(self._layer.x)

    def step(self, index: int) -> None:
        """Run one forward, in decode with what the host does for every step."""
        if self._bookkeeps:
            self._batch.update_(self._layer.extend(self._max_tokens))
        self._replay()

    def after(self, index: int) -> None:
        """Copy the output of a forward to a buffer of its own. Never timed."""
        self._layer.out.copy_(self.out)
        self._layer.after(index)


def capture(backend: Backend, work: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of `work`. Raises `NoGraph`."""
    try:
        replay = backend.graph(work)
    except BackendError as error:
        raise NoGraph(str(error).rstrip(".")) from error
    except Exception as error:  # a stack raises anything when it cannot capture
        raise NoGraph(f"capturing it raised {describe(error)}") from error
    if replay is None:
        raise NoGraph("the backend offers no graphs")
    return replay


def _check_plan(layer: MlaLayer, batch: RaggedBatch) -> None:
    """Raise `NoGraph` for a plan whose host decisions change from step to step."""
    plan = layer.layer.plan(batch)
    if plan.expanded is not None:
        raise NoGraph("requests that take the expanded path keep the lengths of their plan")
    for role in frozen_roles(plan):
        raise NoGraph(
            f"op '{layer.layer.ops[role].name}' ({role}) does not promise that a captured call follows "
            "growing lengths"
        )


def _check_switches(layer: MlaLayer, scenario: Scenario) -> None:
    """Raise `NoGraph` if query scaling or selecting, which the host decides on, starts within a pass."""
    config, first, last = layer.setting.config, max(scenario.kv_lens(0)), max(scenario.final_lens)
    period = config.query_scaling.period if config.query_scaling else 0
    for what, tokens in (("selecting", config.index_topk), ("query scaling", period)):
        if tokens and first <= tokens < last:
            raise NoGraph(f"{what} starts at {tokens} tokens, within the pass")
