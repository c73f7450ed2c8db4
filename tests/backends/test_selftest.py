"""What a tiny batch that fails is blamed on: the cure must be one for this failure."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

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
        (RuntimeError("MUSA out of memory. Tried"), "it finds too little memory for a tiny batch here "),
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
