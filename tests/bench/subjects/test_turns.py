"""Inputs of forwards: none comes twice, and what each should give follows from the plain ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from mla.bench.subjects import inputs as turned
from mla.bench.subjects.inputs import (
    HistorySigns,
    TurnedHidden,
    Turns,
    choices,
    expected_outputs,
    forward_number,
    make_inputs,
)
from mla.bench.workload.scenario import Scenario
from mla.cache import LatentCache
from mla.verify.layer_oracle import oracle
from mla.weights import random_state_dict

if TYPE_CHECKING:
    from mla import MLAConfig

PREFILL = Scenario(name="p", mode="prefill", query_lens=(3, 1, 2), history=(4, 0, 7), runs=12, passes=3)
DECODE = Scenario(name="d", mode="decode", query_lens=(1, 2), history=(4, 3), runs=3)
ONE_REQUEST = Scenario(name="one", mode="decode", query_lens=(1,), history=(5,), runs=2)
CHANGES = [{}, {"q_lora_rank": None}, {"attention_bias": True}, {"output_gate": "element"}]


def words(turns: Turns, number: int) -> tuple[tuple[int, int], ...]:
    turn = turns.turn(number)
    return tuple(zip(turn.signs.tolist(), turn.choices.tolist(), strict=True))


def test_number_zero_is_plain() -> None:
    assert words(Turns(3, 4, True, 1), 0) == ((1, 0),) * 3


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("requests", [1, 2, 5, 16])
def test_a_request_sees_every_input_before_one_comes_again(requests: int, signed: bool) -> None:
    turns = Turns(requests, 8, signed, seed=3)
    period = 16 if signed else 8
    for first in (1, 1 + period):
        turned = [words(turns, first + index) for index in range(period)]
        for request in range(requests):
            assert len({request_words[request] for request_words in turned}) == period
    assert all(sign == 1 for sign, _ in words(turns, 5)) or signed


def test_combinations_do_not_come_twice_in_practice() -> None:
    turns = Turns(4, 64, True, seed=0)
    assert len({words(turns, number) for number in range(1, 2001)}) == 2000


def test_turns_follow_the_seed_and_may_be_asked_for_in_any_order() -> None:
    first, again, other = Turns(3, 4, True, 1), Turns(3, 4, True, 1), Turns(3, 4, True, 2)
    numbers = [5, 900, 1, 17, 5]
    assert [words(first, number) for number in numbers] == [words(again, number) for number in numbers]
    assert [words(first, n) for n in range(1, 9)] != [words(other, n) for n in range(1, 9)]


def test_few_requests_have_more_inputs_to_choose_from() -> None:
    def count(mode: str, requests: int, signed: bool = True) -> int:
        scenario = Scenario(name="s", mode=mode, query_lens=(1,) * requests, history=(0,) * requests)  # type: ignore[arg-type]
        return choices(scenario, signed)

    assert [count("decode", requests) for requests in (1, 4, 16, 100)] == [16, 4, 1, 1]
    assert [count("decode", requests, signed=False) for requests in (1, 16, 100)] == [16, 2, 2]
    assert [count("prefill", requests) for requests in (1, 4, 16, 1000)] == [64, 64, 16, 2]


def test_every_forward_of_a_prefill_has_a_number_of_its_own() -> None:
    steps = PREFILL.steps
    assert [forward_number(PREFILL, number, index) for number in (1, 2) for index in range(steps)] == list(
        range(1, 2 * steps + 1)
    )
    assert {forward_number(PREFILL, 0, index) for index in range(steps)} == {0}
    assert {forward_number(DECODE, 7, index) for index in range(3)} == {7}


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("scenario", [PREFILL, DECODE, ONE_REQUEST], ids=["prefill", "decode", "one"])
def test_the_expected_outputs_of_a_turn_are_the_oracles(
    tiny: Callable[..., MLAConfig], scenario: Scenario, changes: dict[str, object]
) -> None:
    """Each turn's inputs are built once more here, and given to the oracle as they are."""
    config = tiny(**changes)
    state, inputs = (
        random_state_dict(config, 0, torch.float32),
        make_inputs(config, scenario, 0, torch.float32),
    )
    expected, hidden = expected_outputs(config, state, inputs), TurnedHidden(scenario, inputs, CPU)
    for number in range(6):
        turn = inputs.turns.turn(number)
        hidden.take(turn)
        for step in range(scenario.inputs):
            hidden.show(step)
        for request, (kv, pe) in enumerate(inputs.history):
            first = sum(scenario.query_lens[:request])
            rows = slice(first, first + scenario.query_lens[request])
            new = torch.cat([step[rows] for step in hidden.rows])
            sign = int(turn.signs[request])
            whole = oracle(config, state, new, [len(new)], [(sign * kv, sign * pe)])
            for step, part in enumerate(whole.chunk(scenario.inputs)):
                torch.testing.assert_close(expected.rows(step, turn)[rows], part, rtol=1e-9, atol=1e-12)


CPU = torch.device("cpu")


def test_hidden_states_of_a_turn_differ_as_its_number_says_and_keep_their_address(
    tiny: Callable[..., MLAConfig],
) -> None:
    inputs = make_inputs(tiny(), PREFILL, 0, torch.bfloat16)
    hidden = TurnedHidden(PREFILL, inputs, CPU)
    address, seen = hidden.rows.data_ptr(), set()
    for number in range(1, 40):
        turn = inputs.turns.turn(number)
        hidden.take(turn)
        assert bool(hidden.rows.isnan().all()), "nothing can be computed before its inputs are shown"
        hidden.show(0)
        assert hidden.rows.data_ptr() == address
        seen.add(hidden.rows.view(torch.int16).numpy(force=True).tobytes())
        signs = turn.signs.repeat_interleave(torch.tensor(PREFILL.query_lens))
        assert torch.equal(hidden.rows[0, 0] * signs[0], inputs.hidden[0, 0]), "only last tokens are replaced"
    assert len(seen) == 39
    hidden.take(inputs.turns.turn(0))
    hidden.show(0)
    assert torch.equal(hidden.rows, inputs.hidden)


def test_a_decode_step_is_there_when_it_is_shown_and_no_sooner(tiny: Callable[..., MLAConfig]) -> None:
    hidden = TurnedHidden(DECODE, make_inputs(tiny(), DECODE, 0, torch.float32), CPU)
    hidden.take(Turns(2, 1, True, 0).turn(1))
    for step in range(DECODE.inputs):
        hidden.show(step)
        shown = [bool(rows.isfinite().all()) for rows in hidden.rows]
        assert shown == [other <= step for other in range(DECODE.inputs)]


@pytest.mark.parametrize("chunk", [3, 1 << 16])
def test_the_history_takes_the_signs_of_the_last_turn_and_nothing_else_changes(
    tiny: Callable[..., MLAConfig], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(turned, "CHUNK", chunk)
    cache = LatentCache(tiny(), max_tokens=64, page_size=4, num_layers=2, dtype=torch.float32, shuffle=1)
    sequences = cache.new_sequences(3)
    cache.extend(sequences, [5, 4, 9])
    cache.pages.copy_(torch.randn(cache.pages.shape))
    plain, slots = cache.pages.clone(), [cache.slots(sequence) for sequence in sequences]
    history = HistorySigns(cache, sequences)
    for signs in ([1, -1, 1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]):
        history.take(torch.tensor(signs))
        wanted = plain.clone().view(2, -1, plain.shape[-1])
        for sign, slot in zip(signs, slots, strict=True):
            wanted[:, slot] *= sign
        assert torch.equal(cache.pages.view_as(wanted), wanted)
