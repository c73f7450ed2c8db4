"""What an op tries before its first use: right kernels pass, and each part of the trial catches a mistake."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from interpreted import TUNING
from kernel_cases import FORMATS, by_format

from mla_backends.api import AttentionSpec, IndexerSpec, NormSpec
from mla_backends.triton_ops import Launcher, triton_ops

CPU = torch.device("cpu")
MULTIPROCESSORS = 64  # so many that what is tried is split
SPEC = AttentionSpec(4, 64, 16, 32, 16, 0.2, torch.bfloat16, CPU, topk=40)
INDEXER = IndexerSpec(5, 24, 8, 6, torch.bfloat16, CPU)
NORM = NormSpec(48, torch.bfloat16, CPU)
NAMES = (
    "triton_latent", "triton_sparse_latent", "triton_expanded", "triton_write_latent", "triton_rotate_query",
    "triton_rms_norm", "triton_select",
)  # fmt: skip


def answer(name: str, launcher: Launcher, spec: AttentionSpec = SPEC) -> list[str]:
    op = triton_ops(TUNING, MULTIPROCESSORS, launcher)[name]
    return op.preflight({"triton_rms_norm": NORM, "triton_select": INDEXER}.get(name, spec))


@pytest.mark.parametrize("name", NAMES)
def test_right_kernels_pass(name: str) -> None:
    assert answer(name, Launcher()) == []


def stored_as(name: str) -> AttentionSpec:
    size = by_format(name, SPEC.kv_lora_rank, SPEC.qk_rope_head_dim).token_bytes
    return replace(SPEC, cache_format=name, token_bytes=size)


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("name", ["triton_latent", "triton_write_latent"])
def test_right_kernels_pass_with_every_cache_format(name: str, stored: str) -> None:
    assert answer(name, Launcher(), stored_as(stored)) == []


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
        ("triton_sparse_latent", "attend_latent", {"scale": 0.3}),
        ("triton_sparse_latent", "attend_latent", {"selection_row": 0}),
        ("triton_select", "score_latents", {"q_head": 0}),
        ("triton_select", "score_latents", {"requests": 1}),
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


@pytest.mark.parametrize(
    ("name", "kernel", "changes"),
    [
        ("triton_write_latent", "write_latent", {"TOKEN": 64 + 64}),
        ("triton_latent", "attend_latent", {"CAUSAL": False}),
    ],
)
def test_a_wrong_kernel_of_a_format_is_refused(name: str, kernel: str, changes: dict[str, Any]) -> None:
    (reason,) = answer(name, Misled(kernel, **changes), stored_as("fp8_ds_mla"))
    assert "gives wrong results" in reason or "gives a wrong log-sum-exp" in reason
