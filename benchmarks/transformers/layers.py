"""`use_mla` as implementations of `python -m mla.bench --implementations`, beside `transformers` itself.

The attention layer of a causal model of one layer is called alone, one request at a time, as the
benchmark's own `transformers` is. Its mask, which a model makes once per forward, is made off the clock.
"""

from __future__ import annotations

from typing import Any

import torch

from mla.bench.subjects.base import Facts
from mla.bench.subjects.inputs import Inputs, Turn
from mla.bench.subjects.setting import Setting
from mla.bench.subjects.transformers_layer import TransformersLayer
from mla.bench.workload.scenario import Scenario
from mla.verify.layer_oracle import State

# What a model has besides its one attention layer: as little as can be.
SMALL_MODEL = {"num_hidden_layers": 1, "first_k_dense_replace": 1, "vocab_size": 64, "intermediate_size": 64}


class UseMla(TransformersLayer):
    """Our ops in the attention of `transformers`, over its stock `DynamicCache`."""

    title = "use_mla"

    def __init__(self, setting: Setting, state: State) -> None:
        from transformers import AutoModelForCausalLM

        from mla.integrations.transformers import use_mla

        super().__init__(setting, state)
        plain, self.name = self._layer, self.title
        for name, value in SMALL_MODEL.items():
            setattr(self._model.config, name, value)
        with torch.device(setting.device):
            whole: Any = AutoModelForCausalLM.from_config(self._model.config).to(setting.dtype).eval()
        self._layer = whole.model.layers[0].self_attn
        self._layer.load_state_dict(plain.state_dict())
        for name, norm in self._layer.named_children():
            if name.endswith("layernorm"):
                norm.variance_epsilon = setting.config.rms_norm_eps
        self._weight_bytes = sum(parameter.nbytes for parameter in plain.parameters())
        self._weight_bytes += plain.kv_b_proj.weight.nbytes  # which our ops keep twice
        self._whole = use_mla(whole.requires_grad_(False), setting.backend)

    def before(self, index: int) -> None:
        """Make masks anew: a layer that sees one again would take its step as planned."""
        from transformers.masking_utils import causal_mask_function

        from mla.integrations.transformers.admission import visible_keys

        super().before(index)
        for arguments in self._steps[self.scenario.step(index)]:
            new, keys = arguments["position_ids"].shape[1], int(arguments["position_ids"][0, -1]) + 1
            mask = visible_keys(1, new, keys, keys - new, mask_function=causal_mask_function)
            arguments["attention_mask"] = mask

    def _mask(self, query_len: int, kv_len: int) -> torch.Tensor | None:
        return None

    def _arguments(self, step: int) -> list[dict[str, Any]]:
        of_calls = super()._arguments(step)
        lengths = zip(self.scenario.query_lens, self.scenario.kv_lens(step), strict=True)
        for arguments, (new, keys) in zip(of_calls, lengths, strict=True):
            arguments["position_ids"] = torch.arange(keys - new, keys)[None]
        return of_calls

    def facts(self) -> Facts:
        facts = super().facts()
        return Facts(cache_bytes=facts.cache_bytes, weight_bytes=self._weight_bytes)


class UseMlaPaged(UseMla):
    """Our ops over a `PagedCache` for each request."""

    title = "use_mla-paged"

    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        from mla.integrations.transformers import PagedCache

        self._paged = [PagedCache(self._whole, max_tokens=length + 64) for length in scenario.final_lens]
        super().load(scenario, inputs)

    def take(self, turn: Turn) -> None:
        """Write the inputs of a turn, and the history alone to each request's pages."""
        super().take(turn)
        for cache, (kv, pe), sign in zip(self._paged, self._history, turn.signs.tolist(), strict=True):
            cache.reset()
            (sequence,) = cache.latents.new_sequences(1)
            if kv.shape[2]:
                cache.latents.load(sequence, sign * kv[0, 0], sign * pe[0, 0], 0)
            cache.use([sequence])
        self._caches = self._paged
