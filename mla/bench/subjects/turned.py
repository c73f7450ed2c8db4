"""A scenario's inputs on a device, rewritten in place for each turn, off the clock."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mla.bench.subjects.inputs import Inputs
from mla.bench.subjects.turns import Turn
from mla.bench.workload.scenario import Scenario
from mla.cache import LatentCache

# Rows of the cache that are negated at once.
CHUNK = 1 << 16


class TurnedHidden:
    """`rows` [inputs, T, d]: hidden states at a fixed address, which a captured graph may read."""

    def __init__(self, scenario: Scenario, inputs: Inputs, device: torch.device) -> None:
        self.rows = inputs.hidden.to(device, copy=True)
        self._plain = inputs.hidden.to(device, copy=True)
        self._others = inputs.others.to(device)
        self._lens = torch.tensor(scenario.query_lens)
        self._last = (self._lens.cumsum(0) - 1).to(device)
        self._take = self._take_last if scenario.mode == "prefill" else self._take_all

    def take(self, turn: Turn) -> None:
        """Write the hidden states of a turn."""
        self.rows.copy_(self._plain)
        if bool(turn.choices.any()):
            self._take(turn.choices)
        signs = turn.signs.repeat_interleave(self._lens)
        self.rows.mul_(signs.to(self.rows.device, self.rows.dtype)[:, None])

    def _take_last(self, choices: torch.Tensor) -> None:
        """Replace the last row of every request that chooses another one."""
        chosen = choices.nonzero()[:, 0]
        rows = self._others[(choices[chosen] - 1).to(self.rows.device), chosen.to(self.rows.device)]
        self.rows[0].index_copy_(0, self._last[chosen.to(self.rows.device)], rows)

    def _take_all(self, choices: torch.Tensor) -> None:
        """Replace all rows of every request that chooses others."""
        of_row = choices.repeat_interleave(self._lens)
        for choice in of_row.unique().tolist():
            if choice:
                rows = (of_row == choice).nonzero()[:, 0].to(self.rows.device)
                self.rows.index_copy_(1, rows, self._others[choice - 1].index_select(1, rows))


class HistorySigns:
    """Negates the cached history of requests in place. Created when the cache holds the history alone."""

    def __init__(self, cache: LatentCache, sequences: Sequence[int]) -> None:
        self._cache = cache
        self._slots = [cache.slots(sequence) for sequence in sequences]
        self._signs = torch.ones(len(sequences), dtype=torch.int64)

    def take(self, signs: torch.Tensor) -> None:
        """Give each request's history the sign [B] of a turn."""
        changed = (signs != self._signs).nonzero()[:, 0].tolist()
        self._signs = signs
        if changed:
            for rows in torch.cat([self._slots[index] for index in changed]).split(CHUNK):
                self._negate(rows)

    def _negate(self, rows: torch.Tensor) -> None:
        for layer in self._cache.pages:
            flat = layer.view(-1, self._cache.config.latent_dim)
            flat.index_copy_(0, rows, -flat.index_select(0, rows))
