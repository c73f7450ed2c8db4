"""What a layer should do, in float64, row by row, given what it has cached and the selection that it made.

A row reads the keys that it selects and no others, so that a row of a long context costs little. Latents are
multiplied as they are cached: q . (W k) is (q W) . k, exactly the same in float64 but for its last digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mla.config import MLAConfig
from mla.verify.layer_oracle import (
    Held,
    State,
    Stored,
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

    def latents(
        self, hidden: torch.Tensor, positions: torch.Tensor, stored: Stored | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what tokens [t, d] at positions [t] are cached as: kv [t, c] and pe [t, r]."""
        return _latents(self.config, self._state, hidden.cpu().double(), positions, stored)

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
