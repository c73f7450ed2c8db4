"""The `ixformer` adapter on fakes that take one query per row and believe the host's bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_backends.kernels import IxformerMla, KernelRefused, LatentLimits

requests = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 140)), min_size=1, max_size=5)


def test_every_kind_of_batch_is_right(installed: Any, check_latent: Any) -> None:
    with installed("ixformer"):
        op = IxformerMla()
        assert op.writes_lse
        check_latent(op, heads=(1, 16, 128))
        check_latent(op, dtype=torch.float16, page_size=16)


@settings(max_examples=20, deadline=None)
@given(drawn=requests, heads=st.sampled_from([1, 3, 16, 128]), seed=st.integers(0, 99))
def test_any_lengths_are_right(installed: Any, check_drawn: Any, drawn: Any, heads: int, seed: int) -> None:
    with installed("ixformer"):
        check_drawn(IxformerMla(), drawn, heads=heads, seed=seed)


def test_declared_limits_never_put_two_tokens_into_a_row(installed: Any, check_latent: Any) -> None:
    with installed("ixformer"):
        check_latent(IxformerMla(LatentLimits(empty_rows=False, lse_layout="tokens_first")))


def test_as_many_rows_as_requests_need_not_be_the_requests(
    installed: Any, make_problem: Any, assert_right: Any
) -> None:
    """Two rows of one request, with the very lengths of the batch's two requests."""
    with installed("ixformer"):
        problem = make_problem([0, 2], [4, 5])
        assert_right(problem.run(IxformerMla()), problem.truth())


def test_a_release_without_log_sum_exp_says_so_and_leaves_nan(
    installed: Any, check_latent: Any, make_problem: Any
) -> None:
    with installed("ixformer_old"):
        op = IxformerMla()
        assert not op.writes_lse
        check_latent(op, with_lse=False)
        problem = make_problem([1, 3, 1], [5, 70, 0])
        assert problem.run(op)[1].isnan().all()


def test_a_decode_step_is_written_in_place(installed: Any, make_problem: Any, assert_right: Any) -> None:
    with installed("ixformer"):
        op, problem = IxformerMla(), make_problem([1, 1], [33, 64])
        assert_right(problem.run(op), problem.truth())
        assert not op._scratch._held


def test_a_strided_output_is_not_written_in_place(installed: Any, check_strided: Any) -> None:
    with installed("ixformer"):
        check_strided(IxformerMla())


def test_a_captured_call_lets_lengths_grow_into_the_table(
    installed: Any, make_problem: Any, assert_right: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound of the lengths is a constant of the graph; a replay may find longer and empty rows."""
    with installed("ixformer"):
        op = IxformerMla()
        old, new = make_problem([1] * 3, [3, 190, 7]), make_problem([1] * 3, [190, 0, 192], seed=1)
        old.view.kv_lens = (3, 5, 7)
        state = op.prepare(old.spec, old.view)
        monkeypatch.setattr(torch.cpu, "is_current_stream_capturing", lambda: True, raising=False)
        old.view.block_table.copy_(new.view.block_table)
        old.view.kv_lens_device.copy_(new.view.kv_lens_device)
        new.view = old.view
        assert_right(new.run(op, state), new.truth())


def test_a_slice_of_a_wider_cache_is_refused(installed: Any, make_problem: Any) -> None:
    with installed("ixformer") as fakes:
        problem = make_problem([1], [40])
        problem.cache = torch.zeros(3, 64, 600, dtype=torch.bfloat16)[..., :576]
        with pytest.raises(KernelRefused, match="contiguous latent cache"):
            problem.run(IxformerMla())
        assert not fakes.CALLS["vllm_paged_attention_mla"]
