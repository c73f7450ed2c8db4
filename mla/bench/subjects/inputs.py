"""Seeded inputs of a scenario: hidden states and cached history, random in every channel.

Zero or constant inputs flatter a device (power, caches, branch-free softmax), so these inputs avoid both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec
import torch

from mla.bench.subjects import turns
from mla.bench.subjects.turns import Turn, Turns
from mla.bench.workload.scenario import Scenario
from mla.cases.case import generator
from mla.config import MLAConfig
from mla.verify.layer_oracle import State, oracle, oracle_of_choices, oracle_of_last
from mla.verify.oracle_cost import Run

History = list[tuple[torch.Tensor, torch.Tensor]]
AnyScenario = TypeVar("AnyScenario", bound=Scenario)


@dataclass(frozen=True)
class Inputs:
    """Host tensors shared by all implementations, and how forwards take turns with them."""

    hidden: torch.Tensor  # [inputs, T, d]: the plain ones
    history: History  # per request: kv [s, c], normalized; pe [s, r], rotated
    others: torch.Tensor  # to choose from: prefill [n, B, d], last tokens; decode [n, inputs, T, d]
    turns: Turns


@dataclass(frozen=True)
class Expected:
    """The oracle's outputs in float64 for every turn."""

    scenario: Scenario
    plain: torch.Tensor  # [inputs, T, d]
    others: torch.Tensor  # as in `Inputs`

    def rows(self, step: int, turn: Turn) -> torch.Tensor:
        """Return the outputs [T, d] of one forward; `step` is 0 in prefill."""
        rows, lens = self.plain[step].clone(), torch.tensor(self.scenario.query_lens)
        if self.scenario.mode == "prefill":
            chosen = turn.choices.nonzero()[:, 0]
            rows[lens.cumsum(0)[chosen] - 1] = self.others[turn.choices[chosen] - 1, chosen]
        else:
            of_row = turn.choices.repeat_interleave(lens)
            chosen = of_row.nonzero()[:, 0]
            rows[chosen] = self.others[of_row[chosen] - 1, step, chosen]
        return rows.mul_(turn.row_signs(self.scenario.query_lens)[:, None])


@dataclass(frozen=True)
class Requests:
    """The requests of one part of `dp`: a block of the scenario's."""

    first: int
    stop: int

    @classmethod
    def of(cls, scenario: Scenario, part: int, parts: int) -> Requests:
        """Return block `part` of `parts`, as even as can be."""
        count = len(scenario.query_lens)
        return cls(part * count // parts, (part + 1) * count // parts)

    def rows(self, scenario: Scenario) -> slice:
        """Return where the block's new tokens are among those of the scenario."""
        lens = scenario.query_lens
        return slice(sum(lens[: self.first]), sum(lens[: self.stop]))

    def scenario(self, whole: AnyScenario) -> AnyScenario:
        """Return the scenario of the block alone."""
        part = slice(self.first, self.stop)
        return msgspec.structs.replace(
            whole, query_lens=whole.query_lens[part], history=whole.history[part], axes={}
        )

    def inputs(self, whole: Scenario, inputs: Inputs) -> Inputs:
        """Return the block's part of a scenario's inputs."""
        part, rows = slice(self.first, self.stop), self.rows(whole)
        others = inputs.others[:, part] if whole.mode == "prefill" else inputs.others[:, :, rows]
        turns: Any = PartTurns(inputs.turns, part)
        return replace(
            inputs, hidden=inputs.hidden[:, rows], history=inputs.history[part], others=others, turns=turns
        )


@dataclass(frozen=True)
class PartTurns:
    """The turns of some requests among those of a scenario."""

    whole: Turns
    part: slice

    def turn(self, number: int) -> Turn:
        """Return a turn by its number."""
        turn = self.whole.turn(number)
        return Turn(turn.signs[self.part], turn.choices[self.part])


def make_inputs(config: MLAConfig, scenario: Scenario, seed: int, dtype: torch.dtype) -> Inputs:
    """Draw N(0, 1) inputs; a scenario's inputs depend on its seed, name and shape only."""
    random = generator(seed, scenario.name)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    def hidden() -> torch.Tensor:
        return torch.stack([normal(scenario.tokens, config.hidden_size) for _ in range(scenario.inputs)])

    plain = hidden()
    widths = (config.kv_lora_rank, config.qk_rope_head_dim)
    history = [tuple(normal(length, width) for width in widths) for length in scenario.history]
    signed, requests = not config.attention_bias, len(scenario.query_lens)
    count = turns.choices(scenario, signed)
    if scenario.mode == "prefill":
        others = normal(count - 1, requests, config.hidden_size)
    else:
        others = torch.stack([hidden() for _ in range(count - 1)]) if count > 1 else plain[None][:0]
    return Inputs(plain, history, others, Turns(requests, count, signed, seed))  # type: ignore[arg-type]  # pairs


def expected_outputs(config: MLAConfig, state: State, scenario: Scenario, inputs: Inputs) -> Expected:
    """Return the oracle's outputs: all decode steps from one prefill per request, for every choice."""
    lens, history = scenario.query_lens, inputs.history
    if scenario.mode == "decode":
        every = torch.cat((inputs.hidden[None], inputs.others))
        found = _of_steps(config, state, lens, every, history)
        return Expected(scenario, found[0], found[1:])
    plain = oracle(config, state, inputs.hidden[0], lens, history)
    last = oracle_of_last(config, state, inputs.hidden[0], inputs.others, lens, history)
    return Expected(scenario, plain[None], last)


def oracle_runs(config: MLAConfig, scenario: Scenario) -> list[Run]:
    """Return what the oracle computes for `expected_outputs`, request by request."""
    count = turns.choices(scenario, signed=not config.attention_bias)
    requests = list(zip(scenario.query_lens, scenario.history, strict=True))
    if scenario.mode == "decode":
        return [Run(count, new * scenario.inputs, past) for new, past in requests]
    last = [Run(count - 1, 1, past + new - 1, uncached=new - 1) for new, past in requests]
    return [*(Run(1, *one) for one in requests), *last]


def expected_of(
    config: MLAConfig, state: State, scenario: Scenario, history: History, hidden: torch.Tensor
) -> torch.Tensor:
    """Return the oracle's outputs [n, T, d] of `hidden` [n, T, d]: consecutive steps, from the history on."""
    return _of_steps(config, state, scenario.query_lens, hidden[None], history)[0]


def _of_steps(
    config: MLAConfig, state: State, lens: tuple[int, ...], every: torch.Tensor, history: History
) -> torch.Tensor:
    """Return the outputs [n, inputs, T, d] of every choice of hidden states [n, inputs, T, d]."""
    steps = every.shape[1]
    rows = torch.cat([request.flatten(1, 2) for request in every.split(lens, dim=2)], dim=1)
    lengths = [length * steps for length in lens]
    found = oracle_of_choices(config, state, rows, lengths, history).split(lengths, dim=1)
    return torch.cat([request.unflatten(1, (steps, -1)) for request in found], dim=2)
