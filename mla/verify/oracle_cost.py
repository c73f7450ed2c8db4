"""The memory of the float64 oracle of the layer, from lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mla.config import MLAConfig
from mla.verify.layer_oracle import LOGITS_BYTES

WIDE = 8  # bytes of a float64


class Run(NamedTuple):
    """What the oracle computes of one request at once: choices of new tokens over one past."""

    choices: int
    new: int
    past: int
    uncached: int = 0  # tokens of the past whose latents it computes as well

    @property
    def rows(self) -> int:
        return self.choices * self.new

    @property
    def pairs(self) -> int:
        """Query-key pairs whose logits are made, masked ones too."""
        return self.rows * (self.past + self.new)


def oracle_bytes(config: MLAConfig, runs: Sequence[Run], itemsize: int) -> int:
    """Return what inputs of `itemsize` bytes per number, the oracle and its outputs need at most.

    Weights and history count elsewhere. The bounds of a check need less, once the oracle is done.
    """
    numbers = config.hidden_size * sum(run.rows for run in runs)
    outputs = 3 * WIDE * numbers  # of single requests, of all, and by step
    inputs = 3 * itemsize * numbers  # as they were drawn, all choices together, and by request
    return inputs + outputs + max(_run_bytes(config, run) for run in runs)


def _run_bytes(config: MLAConfig, run: Run) -> int:
    """Return what one run needs: rows and their queries, the past with a head's keys and values, logits."""
    per_row = 2 * config.hidden_size + 4 * config.num_attention_heads * config.qk_head_dim
    per_key = 2 * config.latent_dim + 2 * config.qk_head_dim + config.v_head_dim
    logits = WIDE * run.pairs
    at_once = min(logits, max(logits // run.choices, LOGITS_BYTES))
    uncached = run.uncached * (config.hidden_size + 2 * config.latent_dim)
    return WIDE * (run.rows * per_row + run.past * per_key + uncached) + 3 * at_once
