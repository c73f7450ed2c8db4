"""Exact changes of a scenario's inputs whose outputs are known, so that no two forwards are alike.

A layer without biases is odd in its tokens: hidden states and history times -1 give outputs times -1,
exactly, because norms, products and rotations are odd and attention weights do not change. Beyond signs, each
request has a few inputs to choose from. In prefill they differ in the last new token, which no other row
sees, so that each costs the oracle one row. In decode they differ in all tokens of a pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla.bench.workload.scenario import Scenario

# The most last tokens of a prefill's request; and rows of them over all requests.
LAST_TOKENS, LAST_ROWS = 64, 256
# Inputs of a decode pass over all requests: few requests have few signs, and more inputs to choose from.
DECODE_INPUTS = 16


@dataclass(frozen=True, eq=False)
class Turn:
    """The inputs of a forward, or of a pass of decode steps. Positive signs and zero choices are plain."""

    signs: torch.Tensor  # [B] int64, 1 or -1
    choices: torch.Tensor  # [B] int64

    def row_signs(self, query_lens: tuple[int, ...]) -> torch.Tensor:
        """Return the sign of every row [T]."""
        return self.signs.repeat_interleave(torch.tensor(query_lens))


class Turns:
    """The turns of a scenario by number, the same for all implementations; 0 is the plain one.

    Numbers count through every sign and choice of a request in a shuffled order before one comes again, and
    the orders of requests are independent: no combination is likely to come twice.
    """

    def __init__(self, requests: int, choices: int, signed: bool, seed: int) -> None:
        self._requests, self._choices, self._seed = requests, choices, seed
        self._period = choices * (2 if signed else 1)
        self._epoch, self._orders = -1, torch.empty(0)

    def turn(self, number: int) -> Turn:
        """Return a turn by its number."""
        if number == 0:
            places = torch.zeros(self._requests, dtype=torch.int64)
        else:
            epoch, place = divmod(number - 1, self._period)
            places = self._order(epoch)[:, place]
        return Turn(1 - 2 * (places // self._choices), places % self._choices)

    def _order(self, epoch: int) -> torch.Tensor:
        """Return a permutation of the period for every request [B, period]."""
        if epoch != self._epoch:
            random = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
            self._orders = torch.rand(self._requests, self._period, generator=random).argsort(1)
            self._epoch = epoch
        return self._orders


def choices(scenario: Scenario, signed: bool) -> int:
    """Return how many inputs each request of a scenario has to choose from."""
    requests = len(scenario.query_lens)
    if scenario.mode == "prefill":
        return max(2, min(LAST_TOKENS, -(-LAST_ROWS // requests)))
    return max(1 if signed else 2, -(-DECODE_INPUTS // requests))


def forward_number(scenario: Scenario, number: int, index: int) -> int:
    """Return the turn of a forward: in prefill each has its own, in decode the whole pass has one."""
    if scenario.mode == "decode" or number == 0:
        return number
    return (number - 1) * scenario.steps + index + 1
