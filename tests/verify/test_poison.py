"""Poison: what a request does not own is unusable, what it owns is untouched, pass after pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from mla.bench.subjects.inputs import Inputs, make_inputs
from mla.bench.subjects.layer import MlaLayer
from mla.bench.subjects.setting import Setting
from mla.bench.workload.scenario import Scenario
from mla.cache import LatentCache
from mla.verify.layer_check import TAIL, Poison
from mla.weights import random_state_dict
from mla_backends.testing import HostBackend

if TYPE_CHECKING:
    from mla import MLAConfig

DECODE = Scenario(name="d", mode="decode", query_lens=(1, 1, 1, 1), history=(3, 0, 9, 7), runs=6)
PREFILL = Scenario(name="p", mode="prefill", query_lens=(3, 5), history=(4, 0))
PAGE = 4


@pytest.fixture
def setting(tiny: Callable[..., MLAConfig]) -> Setting:
    return Setting(tiny(), HostBackend(), torch.float32, "auto", PAGE, 0)


def load(setting: Setting, scenario: Scenario) -> tuple[MlaLayer, Inputs]:
    """Return a loaded layer and the inputs it got."""
    inputs = make_inputs(setting.config, scenario, 0, setting.dtype)
    layer = MlaLayer(setting, random_state_dict(setting.config, 0, setting.dtype))
    layer.load(scenario, inputs)
    return layer, inputs


def run_pass(layer: MlaLayer, scenario: Scenario) -> None:
    for index in range(scenario.inputs):
        layer.before(index)
        layer.step(index)
        layer.after(index)


def clean(cache: LatentCache) -> torch.Tensor:
    """Return which rows of the flattened cache hold finite numbers only."""
    return cache.pages[0].flatten(0, 1).isfinite().all(dim=1)


@pytest.mark.parametrize("scenario", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("passes", [0, 1, 2])
def test_after_restore_only_history_is_readable(setting: Setting, scenario: Scenario, passes: int) -> None:
    layer, inputs = load(setting, scenario)
    for _ in range(passes):
        run_pass(layer, scenario)
        layer.restore()
    owned = torch.zeros(layer.cache.num_pages * PAGE, dtype=torch.bool)
    for sequence, (kv, pe), length in zip(layer._sequences, inputs.history, scenario.history, strict=True):
        owned[layer.cache.slots(sequence)[:length]] = True
        rows = layer.cache.read(sequence)
        assert torch.equal(rows[0][:length], kv)
        assert torch.equal(rows[1][:length], pe)
    assert torch.equal(clean(layer.cache), owned)


def test_a_pass_writes_only_the_rows_of_its_new_tokens(setting: Setting) -> None:
    layer, _ = load(setting, DECODE)
    run_pass(layer, DECODE)
    assert int(clean(layer.cache).sum()) == sum(DECODE.final_lens)


def test_every_pass_gets_the_same_pages_and_gives_the_same_outputs(setting: Setting) -> None:
    layer, _ = load(setting, DECODE)
    seen = []
    for _ in range(3):
        run_pass(layer, DECODE)
        slots = torch.cat([layer.cache.slots(sequence) for sequence in layer._sequences])
        outputs = torch.stack([output for _, output in sorted(layer.outputs().items())])
        seen.append((slots.tolist(), outputs))
        layer.restore()
    assert seen[0][0] == seen[1][0] == seen[2][0]
    assert torch.equal(seen[0][1], seen[1][1])
    assert torch.equal(seen[0][1], seen[2][1])


def test_pages_are_handed_out_shuffled(setting: Setting) -> None:
    layer, _ = load(setting, Scenario(name="p", mode="prefill", query_lens=(1,), history=(40,)))
    pages = (layer.cache.slots(layer._sequences[0])[::PAGE] // PAGE).tolist()
    assert pages != sorted(pages)


def test_a_read_outside_of_what_is_owned_shows_in_the_output(setting: Setting) -> None:
    layer, _ = load(replace(setting, attention="absorbed"), DECODE)
    batch = layer.cache.extend(layer._sequences, DECODE.query_lens)
    stranger = set(range(layer.cache.num_pages)) - set(batch.block_table.flatten().tolist())
    batch.block_table[2, 0] = stranger.pop()
    layer.before(0)
    out = layer.layer(layer.x, batch, layer.cache.pages[0])
    assert out[2].isnan().all()
    assert out[:2].isfinite().all()


@pytest.mark.parametrize(("nan_safe", "tail"), [(True, torch.nan), (False, TAIL)])
def test_the_tail_is_nan_only_for_ops_that_bear_it(
    tiny: Callable[..., MLAConfig], nan_safe: bool, tail: float
) -> None:
    cache = LatentCache(tiny(), max_tokens=32, page_size=PAGE, dtype=torch.float32, shuffle=1)
    sequences = cache.new_sequences(2)
    for sequence, length in zip(sequences, (3, 5), strict=True):
        cache.load(sequence, torch.ones(length, 32), torch.ones(length, 8))
    free = cache.free_pages
    Poison(cache, sequences, (6, 5), nan_safe).apply()
    assert [cache.length(sequence) for sequence in sequences] == [3, 5]
    assert cache.free_pages == free
    cache.extend(sequences, (3, 0))
    grown, still = (cache.read(sequence)[0] for sequence in sequences)
    assert bool((grown[:3] == 1).all())
    assert bool((still == 1).all())
    torch.testing.assert_close(grown[3:], torch.full((3, 32), tail), equal_nan=True)
    owned = {int(slot) // PAGE for sequence in sequences for slot in cache.slots(sequence)}
    strangers = [page for page in range(cache.num_pages) if page not in owned]
    assert cache.pages[0, strangers].isnan().all()


@pytest.mark.parametrize("scenario", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_an_output_buffer_holds_nothing_before_its_forward(setting: Setting, scenario: Scenario) -> None:
    """In the second pass, too, whose buffers the first one has filled."""
    layer, _ = load(setting, scenario)
    for number in (1, 2):
        layer.restore(number)
        for index in range(scenario.inputs):
            layer.before(index)
            assert layer.out.isnan().all()
            layer.step(index)
            assert layer.out.isfinite().all()
            layer.after(index)
