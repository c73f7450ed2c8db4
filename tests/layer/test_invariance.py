"""What must not matter to the layer: batching, chunking, the path taken, repetition, who owns the output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla import MLA, LatentCache
from mla.errors import StaleBatch
from mla.layer.plan import rebuilt_bytes
from mla.reference import REFERENCE
from mla.weights import random_state_dict

MODES = ("auto", "absorbed", "expanded")
FP32 = 1e-5
# 32 new tokens are break-even for the tiny config, whatever the history.
LONG, SHORT = (50, 10), (2, 60)


class Counting:
    """Counts what the core asks of an op."""

    def __init__(self) -> None:
        self.prepared = self.calls = 0

    def prepare(self, spec: Any, batch: Any) -> Any:
        self.prepared += 1
        return super().prepare(spec, batch)  # type: ignore[misc]

    def __call__(self, *args: Any, **tensors: Any) -> None:
        self.calls += 1
        super().__call__(*args, **tensors)  # type: ignore[misc]


class CountedLatent(Counting, type(REFERENCE["latent_attention"])):  # type: ignore[misc]
    pass


class CountedExpanded(Counting, type(REFERENCE["expanded_attention"])):  # type: ignore[misc]
    pass


@pytest.fixture
def limit_rounds() -> Any:
    """Return a function that lets a round of the expanded path hold only so many context tokens."""

    def limit(case: Any, tokens: int) -> None:
        case.layer.workspace_bytes = rebuilt_bytes(case.config, case.layer.dtype.itemsize, tokens)

    return limit


def test_a_ragged_batch_equals_its_requests_one_by_one(make_case: Any, assert_rows_close: Any) -> None:
    case = make_case([5, 1, 40, 2], [0, 70, 3, 33])
    together = case.run().split([5, 1, 40, 2])
    inputs = case.hidden.split([5, 1, 40, 2])
    for alone, hidden, past in zip(together, inputs, case.history, strict=True):
        cache = LatentCache(case.config, max_tokens=128, page_size=16, dtype=torch.float32)
        (sequence,) = cache.new_sequences(1)
        cache.load(sequence, *past)
        out = case.layer(hidden, cache.extend([sequence], [len(hidden)]), cache.pages[0])
        assert_rows_close(alone, out, FP32)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, FP32), (torch.bfloat16, 1.2e-2)])
def test_a_hundred_decode_steps_equal_one_prefill(make_case: Any, dtype: torch.dtype, bound: float) -> None:
    requests = 3
    case = make_case([100] * requests, [0, 13, 64], dtype=dtype)
    whole = case.run().unflatten(0, (requests, 100))
    written = [case.cache.read(sequence) for sequence in case.ids]
    inputs = case.hidden.unflatten(0, (requests, 100))
    for sequence, past in zip(case.ids, case.history, strict=True):
        case.cache.truncate(sequence, len(past[0]))
    steps = [
        case.layer(inputs[:, i], case.cache.extend(case.ids, [1] * requests), case.cache.pages[0])
        for i in range(100)
    ]
    out = torch.stack(steps, dim=1)
    assert (out.double() - whole.double()).norm() <= bound * whole.double().norm()
    for sequence, expected in zip(case.ids, written, strict=True):
        for actual, latents in zip(case.cache.read(sequence), expected, strict=True):
            torch.testing.assert_close(actual, latents, atol=bound, rtol=bound)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 45), st.integers(0, 90)), min_size=1, max_size=5), st.integers(0, 99)
)
def test_absorbed_expanded_and_auto_agree(
    make_case: Any, assert_rows_close: Any, requests: list[tuple[int, int]], seed: int
) -> None:
    new, old = zip(*requests, strict=True)
    absorbed, expanded, auto = (make_case(new, old, attention=mode, seed=seed).run() for mode in MODES)
    assert_rows_close(expanded, absorbed.double(), FP32)
    assert_rows_close(auto, absorbed.double(), FP32)


@pytest.mark.parametrize(
    "pattern",
    [(LONG, SHORT, LONG), (SHORT, LONG, SHORT), (LONG, SHORT), (SHORT, SHORT, LONG, (0, 9), LONG, SHORT)],
)
def test_a_batch_mixing_both_paths_calls_each_op_once(
    make_case: Any, assert_rows_close: Any, pattern: tuple[tuple[int, int], ...]
) -> None:
    latent, expanded = CountedLatent(), CountedExpanded()
    new, old = zip(*pattern, strict=True)
    case = make_case(new, old, ops={"latent": latent, "expanded": expanded})
    assert_rows_close(case.run(), case.truth(), FP32)
    assert (latent.calls, expanded.calls) == (1, 1)
    case.run()
    assert (latent.calls, expanded.calls) == (2, 2)
    assert (latent.prepared, expanded.prepared) == (1, 1), "the plan is made once per batch"


@pytest.mark.parametrize("tokens", [1, 7, 32, 59, 60, 61, 1000])
def test_rounds_merge_right(make_case: Any, assert_rows_close: Any, limit_rounds: Any, tokens: int) -> None:
    case = make_case([20, 7, 0, 60, 1], [0, 50, 9, 0, 59], attention="expanded")
    limit_rounds(case, tokens)
    assert_rows_close(case.run(), case.truth(), FP32)
    rounds = case.layer.plan(case.batch).expanded.rounds
    assert all(len(part.slots) <= tokens for part in rounds)
    assert sum(len(part.slots) for part in rounds) == 20 + 57 + 60 + 60
    assert (len(rounds) == 1) == (tokens == 1000)


def test_rounds_merge_right_in_bf16_and_with_gaps_between_groups(
    make_case: Any, assert_rows_close: Any, limit_rounds: Any
) -> None:
    new, old = zip(LONG, SHORT, LONG, strict=True)
    case = make_case(new, old, dtype=torch.bfloat16)
    limit_rounds(case, 16)
    assert_rows_close(case.run(), case.truth(), 2.5e-2)


@pytest.mark.parametrize("attention", MODES)
def test_forward_is_idempotent(make_case: Any, attention: str) -> None:
    case = make_case([50, 2, 1], [10, 60, 30], attention=attention)
    hidden, first, pages = case.hidden.clone(), case.run(), case.cache.pages.clone()
    assert torch.equal(case.run(), first)
    assert torch.equal(case.cache.pages.nan_to_num(7), pages.nan_to_num(7))
    assert torch.equal(case.hidden, hidden)


def test_out_is_written_and_returned_also_when_strided(make_case: Any) -> None:
    case = make_case([5, 2], [0, 60])
    expected = case.run()
    wide = torch.full((7, 2 * case.config.hidden_size), torch.nan)
    out = wide[:, : case.config.hidden_size]
    assert case.run(out=out) is out
    assert torch.equal(out, expected)
    assert wide[:, case.config.hidden_size :].isnan().all()


def test_an_out_whose_rows_are_scattered_is_refused(make_case: Any) -> None:
    """The contract promises ops that elements of a row are adjacent."""
    case = make_case([5, 2], [0, 60])
    with pytest.raises(ValueError, match=r"out has strides \[1, 7\]: its elements must be adjacent"):
        case.run(out=torch.empty(case.config.hidden_size, 7).t())


def test_a_request_without_new_tokens_changes_nothing(make_case: Any, assert_rows_close: Any) -> None:
    case = make_case([3, 0, 1], [10, 20, 30])
    before = case.cache.read(case.ids[1])
    assert_rows_close(case.run(), case.truth(), FP32)
    for now, then in zip(case.cache.read(case.ids[1]), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("attention", MODES)
def test_a_batch_without_any_token_gives_an_empty_output(make_case: Any, attention: str) -> None:
    case = make_case([0, 0], [10, 0], attention=attention)
    assert case.run().shape == (0, case.config.hidden_size)


def test_layers_of_one_cache_share_a_plan_and_keep_their_latents_apart(
    tiny: Any, assert_rows_close: Any
) -> None:
    config = tiny()
    layers = [MLA(config, dtype=torch.float32) for _ in range(2)]
    for seed, layer in enumerate(layers):
        layer.load_state_dict(random_state_dict(config, seed, torch.float32))
    cache = LatentCache(config, max_tokens=64, page_size=16, num_layers=2, dtype=torch.float32)
    batch = cache.extend(cache.new_sequences(2), [5, 9])
    hidden = torch.randn(14, config.hidden_size, generator=torch.Generator().manual_seed(0))
    outs = [layer(hidden, batch, pages) for layer, pages in zip(layers, cache.pages, strict=True)]
    assert layers[0].plan(batch) is layers[1].plan(batch)
    other = MLA(tiny(rope_theta=5e4), dtype=torch.float32)
    assert other.plan(batch) is not layers[0].plan(batch)
    assert_rows_close(layers[0](hidden, batch, cache.pages[0]), outs[0].double(), FP32)
    assert not torch.equal(cache.read(0, layer=0)[0], cache.read(0, layer=1)[0])


def test_a_stale_batch_is_refused_before_anything_is_written(make_case: Any) -> None:
    case = make_case([2, 1], [10, 20])
    case.cache.extend(case.ids, [1, 1])
    before = case.cache.pages.clone()
    with pytest.raises(StaleBatch, match="out of date"):
        case.run()
    assert torch.equal(case.cache.pages.nan_to_num(7), before.nan_to_num(7))


def test_many_rounds_in_bf16_are_as_good_as_one(make_case: Any, limit_rounds: Any, tiny: Any) -> None:
    case = make_case([40], [600], tiny(), dtype=torch.bfloat16, attention="expanded")
    truth = case.truth()
    once = (case.run().double() - truth).norm()
    limit_rounds(case, 8)  # 80 rounds: rounding each merge to bf16 would show
    case.batch._memo.clear()
    many = (case.run().double() - truth).norm()
    assert len(case.layer.plan(case.batch).expanded.rounds) == 80
    assert many <= 1.3 * once
