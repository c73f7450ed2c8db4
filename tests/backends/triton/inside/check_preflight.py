"""What an op tries before its first use: right kernels pass, and each part of the trial catches a mistake."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import TUNING

from mla_backends.api import AttentionSpec, NormSpec
from mla_backends.triton_ops import Launcher, triton_ops

CPU = torch.device("cpu")
MULTIPROCESSORS = 64  # so many that what is tried is split
SPEC = AttentionSpec(4, 64, 16, 32, 16, 0.2, torch.bfloat16, CPU)
NORM = NormSpec(48, torch.bfloat16, CPU)
NAMES = ("triton_latent", "triton_expanded", "triton_write_latent", "triton_rotate_query", "triton_rms_norm")


def answer(name: str, launcher: Launcher) -> list[str]:
    op = triton_ops(TUNING, MULTIPROCESSORS, launcher)[name]
    return op.preflight(NORM if name == "triton_rms_norm" else SPEC)


@pytest.mark.parametrize("name", NAMES)
def test_right_kernels_pass(name: str) -> None:
    assert answer(name, Launcher()) == []


class Misled(Launcher):
    """Changes an argument of one kernel on its way."""

    def __init__(self, kernel: str, **changes: Any) -> None:
        super().__init__()
        self._kernel, self._changes = kernel, changes

    def start(self, kernel: Any, grid: Any, arguments: Any, **options: Any) -> None:
        if kernel.fn.__name__ == self._kernel:
            arguments = {**arguments, **self._changes}
        super().start(kernel, grid, arguments, **options)


@pytest.mark.parametrize(
    ("name", "kernel", "changes"),
    [
        ("triton_latent", "attend_latent", {"scale": 0.3}),
        ("triton_latent", "attend_latent", {"CAUSAL": False}),
        ("triton_latent", "merge_latent", {"keys_per_split": 1000}),
        ("triton_expanded", "attend_expanded", {"CAUSAL": False}),
        ("triton_expanded", "attend_expanded", {"scale": 0.3}),
        ("triton_write_latent", "write_latent", {"INTERLEAVED": True}),
        ("triton_rotate_query", "rotate_query", {"INTERLEAVED": False}),
        ("triton_rms_norm", "rms_norm", {"eps": 1.0}),
    ],
)
def test_a_wrong_kernel_is_refused(name: str, kernel: str, changes: dict[str, Any]) -> None:
    (reason,) = answer(name, Misled(kernel, **changes))
    assert "gives wrong results" in reason
