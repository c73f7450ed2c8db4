"""The `flash_mla` adapter on fakes of every generation and vendor, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_adapters import FLASH_MLA, Latent

from mla_backends import BackendError
from mla_backends.kernels import FlashMla, LatentLimits

each_variant = pytest.mark.parametrize("variant", FLASH_MLA.values(), ids=FLASH_MLA)


@each_variant
def test_long_prompts_keep_within_the_rows_a_plan_can_hold(
    installed: Any, make_problem: Any, assert_right: Any, variant: Latent
) -> None:
    """70 tokens of 128 heads are more query rows than 132 (and 56) processors of 64 rows."""
    with installed(variant.folder):
        problem = make_problem([70, 1], [75, 9], heads=128)
        assert_right(problem.run(variant.make()), problem.truth())


# ------------------------------------------------------------------------------------------------ plans


@each_variant
def test_layers_share_one_plan_and_every_batch_has_its_own(
    installed: Any, make_problem: Any, assert_right: Any, variant: Latent
) -> None:
    with installed(variant.folder) as fakes:
        op = variant.make()
        first, second = (
            make_problem([1] * 4, [33, 64, 9, 70]),
            make_problem([1] * 4, [34, 65, 10, 71], seed=1),
        )
        states = [op.prepare(problem.spec, problem.view) for problem in (first, second)]
        assert fakes.CALLS[variant.plan] == 2
        layers = [replace(first, q=-first.q), first]  # two layers of one batch, another batch in between
        for problem, state in ((layers[0], states[0]), (second, states[1]), (layers[1], states[0])):
            assert_right(problem.run(op, state), problem.truth())
        assert fakes.CALLS[variant.plan] == 2


@each_variant
def test_a_plan_of_other_lengths_fails(installed: Any, make_problem: Any, variant: Latent) -> None:
    """What a step must not do: keep the plan while the lengths, in the same memory, have changed."""
    with installed(variant.folder):
        op, problem = variant.make(), make_problem([1, 1], [33, 64])
        state = op.prepare(problem.spec, problem.view)
        problem.run(op, state)
        problem.view.kv_lens_device += 1
        if not variant.tells:
            assert problem.run(op, state)[0].isnan().all()
            return
        with pytest.raises(RuntimeError, match="planned for"):
            problem.run(op, state)


def test_a_decode_step_uses_the_batchs_own_memory(installed: Any, make_problem: Any) -> None:
    """Neither tables nor queries are copied, and nothing of the adapter's own grows."""
    with installed("nvidia_c"):
        op, problem = FLASH_MLA["nvidia_c"].make(), make_problem([2, 2], [33, 64])
        (group,) = op.prepare(problem.spec, problem.view).groups
        assert group.block_table is problem.view.block_table
        assert group.given_lens is problem.view.kv_lens_device
        problem.run(op)
        assert not op._scratch._held


def test_a_mixed_batch_is_one_launch_per_number_of_new_tokens(installed: Any, make_problem: Any) -> None:
    with installed("nvidia_c") as fakes:
        problem = make_problem([1, 3, 1, 3, 9, 0], [40, 3, 70, 5, 9, 8])
        problem.run(FLASH_MLA["nvidia_c"].make())
        assert fakes.CALLS["flash_mla_with_kvcache"] == 3


# ------------------------------------------------------------------------------------------------ graphs


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every call be one that is captured, on a device whose module says so."""
    monkeypatch.setattr(torch.cpu, "is_current_stream_capturing", lambda: True, raising=False)


GRAPHS = {name: variant for name, variant in FLASH_MLA.items() if variant.make().limits.graph}


@pytest.mark.parametrize("variant", GRAPHS.values(), ids=GRAPHS)
def test_a_plan_is_made_once_where_it_is_captured_with_its_calls(
    installed: Any, make_problem: Any, assert_right: Any, variant: Latent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers share what the graph plans; a call outside the graph, which may not have run yet, does not."""
    inside = [True]
    monkeypatch.setattr(torch.cpu, "is_current_stream_capturing", lambda: inside[0], raising=False)
    with installed(variant.folder) as fakes:
        op, problem = variant.make(), make_problem([1] * 4, [33, 190, 0, 5])
        state = op.prepare(problem.spec, problem.view)
        for _ in range(3):
            assert_right(problem.run(op, state), problem.truth())
        assert fakes.CALLS[variant.plan] == 1
        inside[0] = False
        assert_right(problem.run(op, state), problem.truth())
        assert fakes.CALLS[variant.plan] == 2


def test_what_a_graph_captures_is_memory_of_its_own(
    installed: Any, make_problem: Any, assert_right: Any, capture: None
) -> None:
    """Scratch memory that a later, larger batch replaces would be freed under the graph."""
    with installed("moore_mate"):
        op, problem = FLASH_MLA["moore_mate"].make(), make_problem([1, 1], [33, 64], heads=5)
        assert_right(problem.run(op), problem.truth())
        assert not op._scratch._held


def test_a_capture_that_a_replay_would_get_wrong_is_refused(
    installed: Any, make_problem: Any, capture: None
) -> None:
    with installed("nvidia_c"):
        op, problem = FLASH_MLA["nvidia_c"].make(), make_problem([1, 2], [5, 9])
        assert not op.prepare(problem.spec, problem.view).graph_safe
        with pytest.raises(BackendError, match="would not follow its lengths"):
            problem.run(op)
    with installed("metax"), pytest.raises(BackendError, match="waits for the device"):
        make_problem([1], [5]).run(FlashMla(LatentLimits(graph=False)))


# ---------------------------------------------------------------------------------------------- refusals


def no_such_chip(device: torch.device) -> str:
    return "it needs compute capability 9.0, and this device has 8.0"


def test_every_reason_is_given_at_once(installed: Any, make_spec: Any) -> None:
    with installed("nvidia_c"):
        spec = make_spec(dtype=torch.float32, kv_lora_rank=8)
        assert len(FlashMla(LatentLimits(device_reason=no_such_chip)).unsupported_reasons(spec)) == 3


def test_a_wrong_page_size_is_a_reason(make_spec: Any) -> None:
    """The kernel could end the process."""
    op = FLASH_MLA["nvidia_b"].make()
    reasons = op.unsupported_batch(make_spec(), [1], [40], page_size=16)
    assert reasons == ["it reads pages of 64 tokens, but this cache has pages of 16"]
    assert op.unsupported_batch(make_spec(), [1], [40]) == []


def test_heads_are_padded_only_where_that_is_declared(installed: Any, make_spec: Any) -> None:
    padded = LatentLimits(heads=(64, 128), pads_heads_to=(64, 128))
    assert [padded.padded_heads(h) for h in (1, 64, 65, 128, 129)] == [64, 64, 128, 128, None]
    strict = LatentLimits(heads=(64, 128))
    assert [strict.padded_heads(h) for h in (1, 64, 65)] == [None, 64, None]
    assert LatentLimits().padded_heads(7) == 7
    assert LatentLimits(heads=(8,), pads_heads_to=(16,)).padded_heads(16) == 16
