"""Seeded inputs of a scenario: hidden states and cached history, random in every channel.

Zero or constant inputs flatter a device (power, caches, branch-free softmax), so these inputs avoid both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla.bench.workload.scenario import Scenario
from mla.config import MLAConfig
from mla.verify.layer_oracle import State, oracle

History = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Inputs:
    """Host tensors shared by all implementations."""

    hidden: torch.Tensor  # [inputs, T, d]
    history: History  # per request: kv [s, c], normalized; pe [s, r], rotated


def generator(seed: int, name: str) -> torch.Generator:
    """Return the generator of a scenario's random numbers."""
    return torch.Generator().manual_seed(seed * 1_000_003 + sum(name.encode()))


def make_inputs(config: MLAConfig, scenario: Scenario, seed: int, dtype: torch.dtype) -> Inputs:
    """Draw N(0, 1) inputs; a scenario's inputs depend on its seed, name and shape only."""
    random = generator(seed, scenario.name)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    hidden = torch.stack([normal(scenario.tokens, config.hidden_size) for _ in range(scenario.inputs)])
    widths = (config.kv_lora_rank, config.qk_rope_head_dim)
    history = [tuple(normal(length, width) for width in widths) for length in scenario.history]
    return Inputs(hidden, history)  # type: ignore[arg-type]  # each tuple is a pair


def expected_outputs(config: MLAConfig, state: State, scenario: Scenario, inputs: Inputs) -> torch.Tensor:
    """Return the oracle's outputs [inputs, T, d]: all decode steps from one prefill per request."""
    lengths = [length * scenario.inputs for length in scenario.query_lens]
    per_request = zip(*(step.split(scenario.query_lens) for step in inputs.hidden), strict=True)
    hidden = torch.cat([torch.cat(steps) for steps in per_request])
    flat = oracle(config, state, hidden, lengths, inputs.history)
    steps = zip(*(request.chunk(scenario.inputs) for request in flat.split(lengths)), strict=True)
    return torch.stack([torch.cat(requests) for requests in steps])
