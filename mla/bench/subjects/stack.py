"""N layers, each with its own weights and latents, to time forwards with cold weights, as in a model.

Layer i computes what layer 0 computes, with channels rolled by i in two places: in the latent, inside the
layer and its cache, and in the output. So one oracle serves all layers, yet a layer that uses another's
weights or cache is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from mla.bench.subjects.inputs import Inputs
from mla.bench.subjects.layer import MlaLayer
from mla.bench.subjects.setting import Setting
from mla.bench.subjects.tokens import LayerChecker
from mla.bench.workload.scenario import Scenario
from mla.cache.ragged_batch import RaggedBatch
from mla.verify.bounds import BOUNDS, ROW_SLACK
from mla.verify.layer_oracle import State
from mla.verify.verdict import Check


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
    """`setting.layers` layers over one cache: one extend, one plan, and a forward each of the same hidden."""

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
        batch = self.batch if self.scenario.mode == "prefill" else self.extend()
        self._run(batch, self._x, self._outs)

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
        forwards = self._forwards(checker, index)
        rolled = (replace(one, found=one.found.roll(-index, -1)) for one in forwards)
        return checker.check_forwards(rolled, self.held_to_reference)

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

    def compared(self) -> dict[int, torch.Tensor]:
        return {index: found[0] for index, found in super().compared().items()}

    def replace_ops(self, replace: Callable[[str, Any], Any]) -> None:
        for index, layer in enumerate(self.layers):
            layer.replace_ops(partial(_in_layer, replace, index))

    def weight_bytes(self) -> int:
        return sum(layer.weight_bytes() for layer in self.layers)

    def scratch_bytes(self) -> int:
        return sum(layer.scratch_bytes() for layer in self.layers)


def _in_layer(replace: Callable[[str, Any], Any], index: int, role: str, op: Any) -> Any:
    """Call `replace` with the layer in front of the role: "layer 3: o_proj"."""
    return replace(f"layer {index}: {role}", op)


def _badness(check: Check) -> tuple[bool, float]:
    return check.status != "ok", check.error_ratio if check.error_ratio is not None else float("inf")
