"""Our layer as an implementation that can be timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mla.bench.subjects.inputs import Inputs
from mla.bench.subjects.setting import SPARE_PAGES, Setting
from mla.bench.subjects.tokens import LayerImplementation
from mla.bench.subjects.turned import HistorySigns
from mla.bench.subjects.turns import Turn
from mla.bench.workload.scenario import Scenario
from mla.cache import LatentCache
from mla.cache.ragged_batch import RaggedBatch
from mla.command.clock import now_ns
from mla.layer.attention import MLA
from mla.verify.layer_oracle import State
from mla.verify.places import Places
from mla.verify.poison import Poison


class MlaLayer(LayerImplementation):
    """Our layer, with the backend's fused ops (`mla`) or without (`mla-reference`)."""

    batch: RaggedBatch  # the prepared one of a prefill

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
        self._make_buffers(scenario, inputs)
        self._cache = self._make_cache(scenario)
        self._sequences = self._cache.new_sequences(len(scenario.query_lens))
        self._load_history(inputs)
        self._history = HistorySigns(self._cache, self._sequences)
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
        if self.scenario.mode == "prefill":
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
        self.plan_ms = (now_ns() - start) / 1e6

    def ready(self, index: int) -> None:
        super().ready(index)
        if self.scenario.mode == "prefill":
            self.clear_new(self.batch)

    def clear_new(self, batch: RaggedBatch) -> None:
        """Overwrite the latents of a batch's new tokens, which another forward may have written."""
        for layer in self._cache.pages:
            layer.view(-1, layer.shape[-1]).index_fill_(0, batch.slots, torch.nan)

    def step(self, index: int) -> None:
        self.forward(self.batch if self.scenario.mode == "prefill" else self.extend(), self._x, self._out)

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

    def cache_bytes(self) -> int:
        return self._cache.pages.nbytes

    def weight_bytes(self) -> int:
        return self.layer.weight_bytes()

    def scratch_bytes(self) -> int:
        return self.layer.scratch_bytes()

    def replace_ops(self, replace: Callable[[str, Any], Any]) -> None:
        self.layer.replace_ops(replace)

    def ops(self) -> dict[str, str]:
        return self.layer.ops.names()

    def remarks(self) -> dict[str, list[str]]:
        return self.layer.ops.remarks()
