"""`HeadShard`: the weights of some heads, as a state dict of a layer with that many heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from mla.checkpoint import LazyState, Part, StoredLayer
from mla.config import MLAConfig
from mla.layer.packed_weights import check_weights
from mla.weights import weight_shapes

_ROWS = ("q_proj.weight", "q_b_proj.weight", "kv_b_proj.weight")  # heads lie one below the other


class HeadShard(LazyState):
    """Part `part` of `parts` of a layer's heads, with all weights that heads share.

    A checkpoint on disk is read by range: of the weights of heads, nothing but this part. The output's
    bias is in part 0 only, and zero elsewhere: outputs are added up. Raises `WeightError` where the state
    does not fit `config`, which is the whole layer's.
    """

    def __init__(
        self, state: Mapping[str, torch.Tensor], config: MLAConfig, part: int, parts: int, strict: bool = True
    ) -> None:
        self._whole = weight_shapes(config)
        check_weights(state, self._whole, strict)
        self._shapes = weight_shapes(config.with_heads(config.num_attention_heads // parts))
        self._state, self._part = state, part

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._state.dtype(name) if isinstance(self._state, LazyState) else self._state[name].dtype

    def read_into(self, name: str, out: torch.Tensor) -> None:
        if name == "o_proj.bias" and self._part:
            out.zero_()
            return
        part = self._range(name)
        if isinstance(self._state, StoredLayer):
            self._state.read_into(name, out, part)
        else:
            weight = self._state[name].detach()
            out.copy_(weight[part.rows] if weight.dim() == 1 else weight[part])

    def _range(self, name: str) -> Part:
        """Return which rows and columns of a weight this part has."""
        if name in _ROWS:
            return Part(rows=self._slice(self._shapes[name][0]))
        if name == "o_proj.weight":
            return Part(columns=self._slice(self._shapes[name][1]))
        return Part()

    def _slice(self, size: int) -> slice:
        return slice(self._part * size, (self._part + 1) * size)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes  # without reading the weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
