"""A scenario's inputs on a device, rewritten in place for each forward, off the clock."""

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
    """`rows` [inputs, T, d]: hidden states at a fixed address, which a captured graph may read.

    Those of a step are there once it is shown, right before its forward: no work can be done on them earlier.
    """

    def __init__(self, scenario: Scenario, inputs: Inputs, device: torch.device) -> None:
        self.rows = inputs.hidden.to(device, copy=True)
        self._plain = inputs.hidden.to(device, copy=True)
        self._others = inputs.others.to(device)
        self._lens = torch.tensor(scenario.query_lens)
        self._last = (self._lens.cumsum(0) - 1).to(device)
        self._prefill = scenario.mode == "prefill"

    def take(self, turn: Turn) -> None:
        """Hide the hidden states of the last turn; those of this one are there once they are shown."""
        signs = turn.signs.repeat_interleave(self._lens)
        self._choices, self._signs = turn.choices, signs.to(self.rows.device, self.rows.dtype)[:, None]
        self.rows.fill_(torch.nan)

    def show(self, step: int, instead: torch.Tensor | None = None) -> None:
        """Write the hidden states of one step of the turn, or others [T, d] in their place."""
        rows = self.rows[step]
        if instead is not None:
            rows.copy_(instead)
            return
        rows.copy_(self._plain[step])
        if self._prefill:
            self._choose_last(rows)
        else:
            self._choose_all(rows, step)
        rows.mul_(self._signs)

    def _choose_last(self, rows: torch.Tensor) -> None:
        """Replace the last row of every request that chooses another one."""
        chosen = self._choices.nonzero()[:, 0]
        if len(chosen):
            choices, chosen = (self._choices[chosen] - 1).to(rows.device), chosen.to(rows.device)
            rows.index_copy_(0, self._last[chosen], self._others[choices, chosen])

    def _choose_all(self, rows: torch.Tensor, step: int) -> None:
        """Replace all rows of every request that chooses others."""
        of_row = self._choices.repeat_interleave(self._lens)
        for choice in of_row.unique().tolist():
            if choice:
                chosen = (of_row == choice).nonzero()[:, 0].to(rows.device)
                rows.index_copy_(0, chosen, self._others[choice - 1, step].index_select(0, chosen))


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
