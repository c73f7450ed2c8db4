"""Seeded inputs of a scenario, exact changes of them whose outputs are known, and both on a device.

Hidden states and cached history are random in every channel: zero or constant inputs flatter a device (power,
caches, branch-free softmax). No two forwards are alike. A layer without biases and gates is odd: hidden
states and history times -1 give outputs times -1, exactly, because norms, products and rotations are odd and
attention weights do not change. Beyond signs, each request has a few inputs to choose from. In prefill they
differ in the last new token, which no other row sees, so that each costs the oracle one row. In decode they
differ in all tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import msgspec
import torch

from mla.bench.workload.scenario import Scenario
from mla.cache import LatentCache
from mla.cache.formats import Codec, IndexFp8, given_back
from mla.cases.case import generator
from mla.config import MLAConfig
from mla.verify.layer_oracle import Held, Run, State, oracle, oracle_of_last, oracle_of_steps

# The most last tokens of a prefill's request; and rows of them over all requests.
LAST_TOKENS, LAST_ROWS = 64, 256
# Inputs of a decode pass over all requests: few requests have few signs, and more inputs to choose from.
DECODE_INPUTS = 16
# Rows of the cache that are negated at once.
CHUNK = 1 << 16

History = list[tuple[torch.Tensor, torch.Tensor]]
AnyScenario = TypeVar("AnyScenario", bound=Scenario)


@dataclass(frozen=True, eq=False)
class Turn:
    """The inputs of a forward, or of a pass of decode steps. Positive signs and zero choices are plain."""

    signs: torch.Tensor  # [B] int64, 1 or -1
    choices: torch.Tensor  # [B] int64


@dataclass(frozen=True)
class Turns:
    """The turns of a scenario by number, the same for all implementations; 0 is the plain one.

    Numbers count through every sign and choice of a request in a shuffled order before one comes again, and
    the orders of requests are independent: no combination is likely to come twice.
    """

    requests: int
    choices: int
    signed: bool
    seed: int
    part: slice = field(default_factory=lambda: slice(None))  # of the requests

    def turn(self, number: int) -> Turn:
        """Return a turn by its number."""
        places = torch.zeros(self.requests, dtype=torch.int64)
        if number:
            period = self.choices * (2 if self.signed else 1)
            epoch, place = divmod(number - 1, period)
            random = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            places = torch.rand(self.requests, period, generator=random).argsort(1)[:, place]
        places = places[self.part]
        return Turn(1 - 2 * (places // self.choices), places % self.choices)


def choices(scenario: Scenario, signed: bool) -> int:
    """Return how many inputs each request of a scenario has to choose from."""
    requests = len(scenario.query_lens)
    if scenario.mode == "prefill":
        return max(2, min(LAST_TOKENS, -(-LAST_ROWS // requests)))
    return max(1 if signed else 2, -(-DECODE_INPUTS // requests))


def is_signed(config: MLAConfig, scenario: Scenario) -> bool:
    """Return whether inputs may be negated: not bytes of a cache, which are only copied."""
    return config.is_odd and getattr(scenario, "cache_format", None) is None


def forward_number(scenario: Scenario, number: int, index: int) -> int:
    """Return the turn of a forward: in prefill each has its own, in decode the whole pass has one."""
    if scenario.mode == "decode" or number == 0:
        return number
    return (number - 1) * scenario.steps + index + 1


@dataclass(frozen=True)
class Inputs:
    """Host tensors shared by all implementations, and how forwards take turns with them."""

    scenario: Scenario
    hidden: torch.Tensor  # [inputs, T, d]: the plain ones
    history: History  # per request: kv [s, c], normalized; pe [s, r], rotated
    others: torch.Tensor  # to choose from: prefill [n, B, d], last tokens; decode [n, inputs, T, d]
    turns: Turns
    seed: int | None = None  # of `fresh` inputs
    index: tuple[torch.Tensor, ...] = ()  # per request [s, D]: keys of the history, if there is an indexer

    def turn(self, number: int, index: int) -> Turn:
        """Return the turn of forward `index` of pass `number`."""
        return self.turns.turn(forward_number(self.scenario, number, index))

    def forward(self, number: int, index: int) -> tuple[torch.Tensor, History]:
        """Return the hidden states [T, d] of forward `index` of pass `number`, and the history before it.

        In decode the history is that of the pass: the tokens of earlier steps are not in it.
        """
        turn, step = self.turn(number, index), self.scenario.step(index)
        hidden = TurnedRows(self.scenario, self.hidden, self.others).rows(step, turn)
        signs = turn.signs.to(hidden.dtype)
        signed = [(sign * kv, sign * pe) for sign, (kv, pe) in zip(signs, self.history, strict=True)]
        return hidden, signed

    def stored(self, codec: Codec | None, index_codec: IndexFp8 | None = None) -> Inputs:
        """Return the inputs with the history as a cache gives it back."""
        history, index = self.history, self.index
        if codec is not None:
            history = [given_back(codec, *past) for past in history]
        if index_codec is not None:
            index = tuple(index_codec.given_back(keys) for keys in index)
        return replace(self, history=history, index=index)

    def fresh(self, seed: int) -> Inputs:
        """Return inputs that nothing has seen: other plain hidden states, and another sign in every channel
        of a request's history.
        """
        random = torch.Generator().manual_seed(seed)
        hidden = torch.randn(self.hidden.shape, generator=random).to(self.hidden.dtype)

        def changed(rows: torch.Tensor) -> torch.Tensor:
            return rows * (1 - 2 * torch.randint(2, rows.shape[1:], generator=random)).to(rows.dtype)

        history = [(changed(kv), changed(pe)) for kv, pe in self.history]
        index = tuple(map(changed, self.index))
        return replace(self, hidden=hidden, history=history, seed=seed, index=index)


@dataclass(frozen=True)
class TurnedRows:
    """The rows of every turn: hidden states, or the oracle's outputs in float64."""

    scenario: Scenario
    plain: torch.Tensor  # [inputs, T, d]
    others: torch.Tensor  # as in `Inputs`

    def rows(self, step: int, turn: Turn) -> torch.Tensor:
        """Return the rows [T, d] of one forward; `step` is 0 in prefill."""
        rows = torch.empty_like(self.plain[step])
        self.write(rows, step, turn)
        return rows

    def write(self, rows: torch.Tensor, step: int, turn: Turn) -> None:
        """Write the rows [T, d] of one forward in place, on the device that these tensors are on."""
        lens, device = torch.tensor(self.scenario.query_lens), rows.device
        rows.copy_(self.plain[step])
        if self.scenario.mode == "prefill":  # the last row of every request that chooses another one
            requests = turn.choices.nonzero()[:, 0]
            chosen, places = lens.cumsum(0)[requests] - 1, (turn.choices[requests] - 1, requests)
            others = self.others
        else:  # all rows of every request that chooses others
            choices = turn.choices.repeat_interleave(lens)
            chosen = choices.nonzero()[:, 0]
            others, places = self.others[:, step], (choices[chosen] - 1, chosen)
        if len(chosen):
            choice, place = (index.to(device) for index in places)
            rows.index_copy_(0, chosen.to(device), others[choice, place])
        rows.mul_(turn.signs.repeat_interleave(lens).to(device, rows.dtype)[:, None])


@dataclass(frozen=True)
class Requests:
    """The requests of one part of `dp`: a block of the scenario's."""

    part: slice

    @classmethod
    def of(cls, scenario: Scenario, part: int, parts: int) -> Requests:
        """Return block `part` of `parts`, as even as can be."""
        count = len(scenario.query_lens)
        return cls(slice(part * count // parts, (part + 1) * count // parts))

    def rows(self, scenario: Scenario) -> slice:
        """Return where the block's new tokens are among those of the scenario."""
        lens = scenario.query_lens
        return slice(sum(lens[: self.part.start]), sum(lens[: self.part.stop]))

    def scenario(self, whole: AnyScenario) -> AnyScenario:
        """Return the scenario of the block alone."""
        query_lens, history = whole.query_lens[self.part], whole.history[self.part]
        return msgspec.structs.replace(whole, query_lens=query_lens, history=history, axes={})

    def inputs(self, whole: Scenario, inputs: Inputs) -> Inputs:
        """Return the block's part of a scenario's inputs."""
        part, rows = self.part, self.rows(whole)
        others = inputs.others[:, part] if whole.mode == "prefill" else inputs.others[:, :, rows]
        return replace(
            inputs,
            scenario=self.scenario(whole),
            hidden=inputs.hidden[:, rows],
            history=inputs.history[part],
            index=inputs.index[part],
            others=others,
            turns=replace(inputs.turns, part=part),
        )


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
    signed, requests = is_signed(config, scenario), len(scenario.query_lens)
    count = choices(scenario, signed)
    if scenario.mode == "prefill":
        others = normal(count - 1, requests, config.hidden_size)
    else:
        others = torch.stack([hidden() for _ in range(count - 1)]) if count > 1 else plain[None][:0]
    turns = Turns(requests, count, signed, seed)
    indexed = scenario.history if config.index_n_heads else ()
    index = tuple(normal(length, config.index_head_dim) for length in indexed)
    return Inputs(scenario, plain, history, others, turns, index=index)  # type: ignore[arg-type]  # pairs


# ------------------------------------------------------------------------------------------------- oracle


def expected_outputs(config: MLAConfig, state: State, inputs: Inputs, held: Held | None = None) -> TurnedRows:
    """Return the oracle's outputs: all decode steps from one prefill per request, for every choice."""
    scenario, history = inputs.scenario, inputs.history
    lens = scenario.query_lens
    if scenario.mode == "decode":
        every = torch.cat((inputs.hidden[None], inputs.others))
        outputs = oracle_of_steps(config, state, every, lens, history, held)
        return TurnedRows(scenario, outputs[0], outputs[1:])
    plain = oracle(config, state, inputs.hidden[0], lens, history, held)
    last = oracle_of_last(config, state, inputs.hidden[0], inputs.others, lens, history, held)
    return TurnedRows(scenario, plain[None], last)


def expected_plain(
    config: MLAConfig, state: State, inputs: Inputs, count: int, held: Held | None = None
) -> torch.Tensor:
    """Return the oracle's outputs [count, T, d] of the first forwards of a plain pass."""
    hidden = inputs.hidden[None, :count]
    return oracle_of_steps(config, state, hidden, inputs.scenario.query_lens, inputs.history, held)[0]


def oracle_runs(config: MLAConfig, scenario: Scenario) -> list[Run]:
    """Return what the oracle computes for `expected_outputs`, request by request."""
    count = choices(scenario, is_signed(config, scenario))
    requests = list(zip(scenario.query_lens, scenario.history, strict=True))
    if scenario.mode == "decode":
        return [Run(count, new * scenario.inputs, past) for new, past in requests]
    last = [Run(count - 1, 1, past + new - 1, uncached=new - 1) for new, past in requests]
    return [*(Run(1, *request) for request in requests), *last]


# ---------------------------------------------------------------------------------------------- on a device


class TurnedHidden:
    """`rows` [inputs, T, d]: hidden states at a fixed address, which a captured graph may read.

    Those of a step are there once it is shown, right before its forward: no work can be done on them earlier.
    """

    def __init__(self, scenario: Scenario, inputs: Inputs, device: torch.device) -> None:
        self.rows = inputs.hidden.to(device, copy=True)
        self._turned = TurnedRows(scenario, inputs.hidden.to(device, copy=True), inputs.others.to(device))

    def change(self, inputs: Inputs) -> None:
        """Take other plain inputs, at the same addresses."""
        self._turned.plain.copy_(inputs.hidden)

    def take(self, turn: Turn) -> None:
        """Hide the hidden states of the last turn; those of this one are there once they are shown."""
        self._turn = turn
        self.rows.fill_(torch.nan)

    def show(self, step: int) -> None:
        """Write the hidden states of one step of the turn."""
        self._turned.write(self.rows[step], step, self._turn)


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
            flat = [layer.view(-1, self._cache.config.latent_dim) for layer in self._cache.pages]
            for rows in torch.cat([self._slots[index] for index in changed]).split(CHUNK):
                for layer in flat:
                    layer.index_copy_(0, rows, -layer.index_select(0, rows))
