"""The `ixformer` adapter on fakes that take one query per row and believe the host's bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mla_backends.kernels import IxformerMla, KernelRefused, LatentLimits


def test_declared_limits_never_put_two_tokens_into_a_row(installed: Any, check_latent: Any) -> None:
    with installed("ixformer"):
        check_latent(IxformerMla(LatentLimits(empty_rows=False, lse_layout="tokens_first")))


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


def test_a_slice_of_a_wider_cache_is_refused(installed: Any, make_problem: Any) -> None:
    with installed("ixformer") as fakes:
        problem = make_problem([1], [40])
        problem.cache = torch.zeros(3, 64, 600, dtype=torch.bfloat16)[..., :576]
        with pytest.raises(KernelRefused, match="contiguous latent cache"):
            problem.run(IxformerMla())
        assert not fakes.CALLS["vllm_paged_attention_mla"]
