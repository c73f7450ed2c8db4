"""MATE's kernels as the Moore Threads plugin offers them, on fakes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mla_backend_moore.kernels import CAPABILITY, kernels
from mla_backends.kernels import KernelRefused

WIDTHS = [(128, 64, 128), (64, 64, 128), (16, 64, 16), (32, 32, 64)]  # nope, rope, values


def offered(name: str) -> Any:
    return kernels(lambda: CAPABILITY)[name]


def test_widths_without_a_kernel_are_refused(installed: Any, make_spec: Any) -> None:
    with installed("moore_mate"):
        op = offered("mate_varlen")
        for nope, rope, value in WIDTHS:
            spec = make_spec(qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=value)
            assert op.unsupported_reasons(spec) == []
        for nope, rope, value in ((128, 64, 192), (128, 32, 128), (192, 64, 256)):
            spec = make_spec(qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=value)
            (reason,) = op.unsupported_reasons(spec)
            assert reason == (
                f"it takes heads of 192 and 128 or of at most 128, not {nope + rope} and {value}"
            )


def test_tokens_without_keys_are_refused(installed: Any, make_spec: Any) -> None:
    with installed("moore_mate"):
        op, reason = offered("mate_varlen"), ["what it gives for a token without keys is not documented"]
        assert op.unsupported_batch(make_spec(), (2, 1), (0, 5)) == reason
        assert op.unsupported_batch(make_spec(), (3,), (2,)) == reason
        assert op.unsupported_batch(make_spec(), (0, 3), (0, 3)) == []


@pytest.mark.parametrize(("name", "module"), [("mate", "flashmla"), ("mate_varlen", "mha_interface")])
def test_a_kernel_that_cannot_be_compiled_is_a_reason(
    installed: Any, make_spec: Any, name: str, module: str
) -> None:
    with installed("moore_mate") as fakes:
        op = offered(name)
        assert op.compiles
        assert op.preflight(make_spec()) == []
        fakes.CAPABILITY["mate"] = (2, 2)
        (reason,) = offered(name).preflight(make_spec())
        assert reason == (
            f"mate.{module} raises RuntimeError: mate needs MP31 on a tiny batch here; install the MUSA "
            "toolkit with mcc, or a MATE with kernels built ahead of time"
        )


def test_a_cache_in_which_sparse_kernels_lose_their_way_is_refused(installed: Any, make_problem: Any) -> None:
    problem = make_problem((1,), (70,))
    selection = torch.zeros(1, 8, dtype=torch.int32)
    problem.spec = replace(problem.spec, topk=8)
    with installed("moore_mate"):
        op = offered("mate_sparse")
        assert (op.limits.max_bytes, op.limits.graph) == ((1 << 31) - 1, False)
        op.limits = replace(op.limits, max_bytes=problem.cache.numel())  # half of its bytes
        with pytest.raises(KernelRefused, match=r"reads caches of at most 0 MiB.*give the cache fewer pages"):
            problem.run(op, selection=selection)
