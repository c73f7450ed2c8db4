"""What a tiny batch that fails is blamed on: the cure must be one for this failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mla.reference import REFERENCE
from mla_backends import selftest
from mla_backends.api import AttentionSpec, IndexerSpec, NormSpec
from mla_backends.selftest import failures

CURE = "install the compiler"


def raising(error: BaseException) -> Callable[[], str]:
    def attempt() -> str:
        raise error

    return attempt


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), "it finds too little memory for a tiny "),
        (RuntimeError("CUDA error: out of memory"), "it finds too little memory for a tiny batch here "),
        (RuntimeError("cublas: CUBLAS_STATUS_ALLOC_FAILED"), "it finds too little memory for a tiny "),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "it fails on this device "),
        (RuntimeError("MUSA error: unspecified launch failure"), "it fails on this device "),
        (RuntimeError("no kernel image is available for execution"), "it fails on this device "),
    ],
)
def test_memory_and_device_are_no_matter_of_a_compiler(error: BaseException, said: str) -> None:
    (reason,) = failures(raising(error), "it", CURE)
    assert reason.startswith(said)
    assert str(error) in reason
    assert CURE not in reason
    wrapped = RuntimeError("the launch failed")
    wrapped.__cause__ = error
    assert CURE not in failures(raising(wrapped), "it", CURE)[0]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Could not find nvcc and default cuda_home='/usr/local/cuda' doesn't exist"),
        RuntimeError("Ninja build failed. Ninja output:\nCUDA error: illegal memory"),
        OSError("CUDA_HOME environment variable is not set"),
    ],
)
def test_a_compiler_is_the_cure_where_none_is_found(error: BaseException) -> None:
    (reason,) = failures(raising(error), "it", CURE)
    assert reason.endswith(f"on a tiny batch here; {CURE}")


def test_wrong_numbers_are_no_matter_of_a_compiler_either() -> None:
    (reason,) = failures(lambda: "gives wrong results", "it", CURE)
    assert reason.startswith("it gives wrong results on a tiny batch here; update the package")
    assert failures(lambda: "", "it", CURE) == []


# ------------------------------------------------------------------------------------- the tiny problems
CPU, WRONG = torch.device("cpu"), "gives wrong results"
SPEC = AttentionSpec(4, 32, 16, 8, 16, 0.2, torch.float32, CPU, topk=8)
TRIALS: dict[str, Callable[[Any], str]] = {
    "latent_attention": lambda op: selftest.try_latent(op, SPEC, 16),
    "sparse_latent_attention": lambda op: selftest.try_latent(op, SPEC, 16),
    "expanded_attention": lambda op: selftest.try_expanded(op, SPEC),
    "select_latents": lambda op: selftest.try_select(op, IndexerSpec(4, 32, 8, 8, torch.float32, CPU), 16),
    "rms_norm": lambda op: selftest.try_rms_norm(op, NormSpec(32, torch.float32, CPU)),
    "rotate_query": lambda op: selftest.try_rotate_query(op, SPEC),
    "write_latent": lambda op: selftest.try_write_latent(op, SPEC),
}


class Mistaken:
    """An op that is given other operands, or whose results are changed in place."""

    def __init__(
        self, kind: str, given: Callable[[Any], Any] = dict, after: Callable[[Any], Any] = id
    ) -> None:
        self._op, self._given, self._after = REFERENCE[kind], given, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._op, name)

    def __call__(self, *state: Any, **operands: Any) -> None:
        self._op(*state, **{**operands, **self._given(operands)})
        self._after(operands)


ONE_LAYOUT = {"given": lambda operands: {"interleaved": True}}


@pytest.mark.parametrize("kind", TRIALS)
def test_a_right_op_passes_and_one_with_a_wrong_row_does_not(kind: str) -> None:
    assert TRIALS[kind](Mistaken(kind)) == ""
    target = "cache" if kind == "write_latent" else "out"
    assert TRIALS[kind](Mistaken(kind, after=lambda given: given[target][-1].zero_())) == WRONG


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [
        ("latent_attention", {"after": lambda given: given["lse"].add_(0.1)}),
        (
            "expanded_attention",
            {"given": lambda given: {"v": given["v"].as_strided((73, 4, 16), (64, 16, 1), 0)}},
        ),
        ("sparse_latent_attention", {"given": lambda given: {"selection": given["selection"] // 2}}),
        ("select_latents", {"after": lambda given: given["out"][0, 3:].fill_(0)}),  # no -1 behind
        ("select_latents", {"after": lambda given: given["out"][1, 1:2].copy_(given["out"][1, :1])}),
        ("rotate_query", ONE_LAYOUT),
        ("write_latent", ONE_LAYOUT),
    ],
)
def test_a_mistake_of_each_kind_is_found(kind: str, mistake: Any) -> None:
    assert TRIALS[kind](Mistaken(kind, **mistake)).startswith("gives ")
