"""Our layer as an implementation that can be timed, and N layers, which have cold weights, as in a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter_ns as now_ns
from typing import Any

import torch

from mla.bench.subjects.base import Facts, LayerChecker, LayerImplementation, Outputs
from mla.bench.subjects.inputs import HistorySigns, Inputs, Turn
from mla.bench.subjects.setting import SPARE_PAGES, Setting
from mla.bench.workload.scenario import Scenario
from mla.cache import LatentCache
from mla.cache.ragged_batch import RaggedBatch
from mla.layer.attention import MLA
from mla.verify.layer_check import Poison
from mla.verify.layer_oracle import State
from mla.verify.places import Places
from mla.verify.tolerances import BOUNDS, ROW_SLACK
from mla.verify.verdict import Check


class MlaLayer(LayerImplementation):
    """Our layer, with the backend's fused ops (`mla`) or without (`mla-reference`)."""

    batch: RaggedBatch  # the prepared one of a prefill
    _cache: LatentCache
    _sequences: list[int]

    def __init__(self, setting: Setting, state: State, name: str = "mla", ops: str | None = None) -> None:
        super().__init__(setting)
        self.name = name
        self.layer = self._make_layer(ops, 0)
        self.layer.load_state_dict(state)
        self.held_to_reference = not self.layer.ops.all_reference()

    def _make_layer(self, ops: str | None, index: int) -> MLA:
        setting = self.setting
        layer = MLA(
            setting.config,
            backend=setting.backend,
            dtype=setting.dtype,
            attention=setting.attention,
            ops=ops or setting.ops,
            overrides=dict(setting.overrides),
        )
        if setting.weights is not None:
            layer.share_weights(setting.weights[index])
        return layer

    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        again = self.loaded(scenario)
        self._make_buffers(scenario, inputs)
        if again:
            self._shrink()
            for sequence in reversed(self._sequences):  # then the same pages are taken, which a graph reads
                self._cache.truncate(sequence, 0)
        else:
            self._cache = self._make_cache(scenario)
            self._sequences = self._cache.new_sequences(len(scenario.query_lens))
        self._load_history(inputs)
        self._history = HistorySigns(self._cache, self._sequences)
        if not again:
            nan_safe = self.layer.ops["latent_attention"].op.nan_safe_tail
            self._poison = Poison(self._cache, self._sequences, scenario.final_lens, nan_safe)
        self.restore()

    def _make_buffers(self, scenario: Scenario, inputs: Inputs) -> None:
        self.prepare_buffers(scenario, inputs)

    def _load_history(self, inputs: Inputs) -> None:
        for sequence, (kv, pe) in zip(self._sequences, inputs.history, strict=True):
            self._cache.load(sequence, kv, pe)

    def _make_cache(self, scenario: Scenario) -> LatentCache:
        size = self.setting.page_size
        pages = sum(-(-length // size) for length in scenario.final_lens) + SPARE_PAGES
        return LatentCache(
            self.setting.config,
            max_tokens=pages * size,
            page_size=size,
            num_layers=self.setting.layers,
            device=self.setting.device,
            dtype=self.setting.dtype,
            shuffle=self.setting.seed,
        )

    @property
    def cache(self) -> LatentCache:
        """The scenario's cache, once it is loaded."""
        return self._cache

    def restore(self, number: int = 0) -> None:
        self.rewind(number)
        if self._prefills:
            self._plan()

    def rewind(self, number: int = 0) -> None:
        """Put the cache back to the history, without a batch for the next forward."""
        self._shrink()
        self.take(self.begin(number))
        self._poison.apply()

    def take(self, turn: Turn) -> None:
        super().take(turn)
        self._history.take(turn.signs)

    def _shrink(self) -> None:
        """Undo the pass, last pages first, so that the free list and thus every pass's pages are the same."""
        scenario = self.scenario
        for step in reversed(range(scenario.inputs)):
            grown = zip(self._sequences, scenario.kv_lens(step), scenario.query_lens, strict=True)
            for sequence, length, new in reversed(list(grown)):
                if self._cache.length(sequence) > length - new:
                    self._cache.truncate(sequence, length - new)

    def _plan(self) -> None:
        """Prepare the batch that every prefill forward runs; its time is reported separately."""
        self.batch = self._cache.extend(self._sequences, self.scenario.query_lens)
        start = now_ns()
        self.layer.plan(self.batch)
        self._plan_ms: float | None = (now_ns() - start) / 1e6

    def ready(self, index: int) -> None:
        super().ready(index)
        if self._prefills:
            self.clear_new(self.batch)

    def clear_new(self, batch: RaggedBatch) -> None:
        """Overwrite the latents of a batch's new tokens, which another forward may have written."""
        for layer in self._cache.pages:
            layer.view(-1, layer.shape[-1]).index_fill_(0, batch.slots, torch.nan)

    def step(self, index: int) -> None:
        self.forward(self.batch if self._prefills else self.extend(), self._x, self._out)

    def extend(self, table_tokens: int = 0) -> RaggedBatch:
        """Make room for the next decode step and return its batch (`LatentCache.extend`)."""
        return self._cache.extend(self._sequences, self.scenario.query_lens, table_tokens=table_tokens)

    def forward(self, batch: RaggedBatch, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """Run the layer on any batch of the cache."""
        self.layer(hidden, batch, self._cache.pages[0], out=out)

    def places(self, step: int) -> Places:
        size = self._cache.page_size
        pages = [self._cache.slots(sequence)[::size].cpu() // size for sequence in self._sequences]
        table = torch.nn.utils.rnn.pad_sequence(pages, batch_first=True)
        return Places.new_tokens(self.scenario.query_lens, self.scenario.kv_lens(step), table, size)

    def facts(self) -> Facts:
        layers = self.each_layer()
        return Facts(
            cache_bytes=self._cache.pages.nbytes if hasattr(self, "_cache") else 0,
            weight_bytes=sum(layer.weight_bytes() for layer in layers),
            scratch_bytes=sum(layer.scratch_bytes() for layer in layers),
            plan_ms=getattr(self, "_plan_ms", None),
            ops=self.layer.ops.names(),
            remarks=self.layer.ops.remarks(),
        )

    def each_layer(self) -> list[MLA]:
        """Return the layers, in their order."""
        return [self.layer]

    def replace_ops(self, replace: Callable[[str, Any], Any]) -> None:
        """Put `replace(role, op)` in place of every op; called before `load`.

        Of several layers, "layer 3: " stands before the role.
        """
        self.layer.replace_ops(replace)


def layer_state(state: State, index: int) -> dict[str, torch.Tensor]:
    """Return the weights of layer `index`, the rolled ones as copies."""
    rank = state["kv_a_layernorm.weight"].shape[0]
    rolled = {
        "kv_a_layernorm.weight": state["kv_a_layernorm.weight"].roll(index, 0),
        "kv_b_proj.weight": state["kv_b_proj.weight"].roll(index, 1),
    }
    for name in ("kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias"):
        if name in state:
            rolled[name] = torch.cat((state[name][:rank].roll(index, 0), state[name][rank:]))
    for name in ("o_proj.weight", "o_proj.bias"):
        if name in state:
            rolled[name] = state[name].roll(index, 0)
    return {**state, **rolled}


class MlaStack(MlaLayer):
    """`setting.layers` layers over one cache: one extend, one plan, and a forward each of the same hidden.

    Layer i computes what layer 0 computes, with channels rolled by i in two places: in the latent, inside the
    layer and its cache, and in the output. So one oracle serves all layers, yet a layer that uses another's
    weights or cache is wrong.
    """

    def __init__(self, setting: Setting, state: State, name: str = "mla", ops: str | None = None) -> None:
        super().__init__(setting, state, name, ops)
        self.layers = [self.layer, *(self._make_layer(ops, index) for index in range(1, setting.layers))]
        for index, layer in enumerate(self.layers[1:], 1):
            layer.load_state_dict(layer_state(state, index))

    def _make_buffers(self, scenario: Scenario, inputs: Inputs) -> None:
        self.prepare_buffers(scenario, inputs, len(self.layers))

    def _load_history(self, inputs: Inputs) -> None:
        for index in range(len(self.layers)):
            for sequence, (kv, pe) in zip(self._sequences, inputs.history, strict=True):
                self._cache.load(sequence, kv.roll(index, 1), pe, layer=index)
        self._pages = list(self._cache.pages)

    def ready(self, index: int) -> None:
        super().ready(index)
        self._outs = list(self._out)  # views, made before anything is timed

    def step(self, index: int) -> None:
        self._run(self.batch if self._prefills else self.extend(), self._x, self._outs)

    def forward(self, batch: RaggedBatch, hidden: torch.Tensor, out: torch.Tensor) -> None:
        self._run(batch, hidden, list(out))

    def _run(self, batch: RaggedBatch, hidden: torch.Tensor, outs: list[torch.Tensor]) -> None:
        for layer, pages, out in zip(self.layers, self._pages, outs, strict=True):
            layer(hidden, batch, pages, out=out)

    def check(self, checker: LayerChecker) -> Check:
        """Check every layer's outputs, and that its new latents are in its own part of the cache."""
        found = [self._check_layer(checker, index) for index in range(len(self.layers))]
        for index, one in enumerate(found):
            if one.status == "ok" and not self._cached(index):
                one.status, one.reason = "wrong", "its latents are not in its part of the cache"
        worst = max(range(len(found)), key=lambda index: _badness(found[index]))
        if found[worst].reason:
            found[worst].reason = f"layer {worst}: {found[worst].reason}"
        return found[worst]

    def _check_layer(self, checker: LayerChecker, index: int) -> Check:
        outputs = {forward: found[index].roll(-index, -1) for forward, found in super().outputs().items()}
        return checker.check_pass(outputs, self._number, self.held_to_reference, self.places)

    def _cached(self, index: int) -> bool:
        """Return whether a layer cached the same as layer 0, rolled and up to rounding."""
        bound = ROW_SLACK * BOUNDS[self.setting.dtype]
        for sequence in self._sequences:
            first, own = (torch.cat(self._unrolled(sequence, layer), dim=1) for layer in (0, index))
            errors = (own - first).norm(dim=1) / first.norm(dim=1)
            if not bool((errors <= bound).all()):  # NaN is not
                return False
        return True

    def _unrolled(self, sequence: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        kv, pe = self._cache.read(sequence, layer=index)
        return kv.float().roll(-index, 1), pe.float()

    def outputs(self) -> Outputs:
        return {index: found[0] for index, found in super().outputs().items()}

    def each_layer(self) -> list[MLA]:
        return self.layers

    def replace_ops(self, replace: Callable[[str, Any], Any]) -> None:
        for index, layer in enumerate(self.layers):
            layer.replace_ops(partial(_in_layer, replace, index))


def _in_layer(replace: Callable[[str, Any], Any], index: int, role: str, op: Any) -> Any:
    """Call `replace` with the layer in front of the role: "layer 3: o_proj"."""
    return replace(f"layer {index}: {role}", op)


def _badness(check: Check) -> tuple[bool, float]:
    return check.status != "ok", check.error_ratio if check.error_ratio is not None else float("inf")
