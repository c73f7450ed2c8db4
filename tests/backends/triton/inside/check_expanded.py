"""The kernel of `expanded_attention`, against float64, in poisoned memory."""

from __future__ import annotations

import interpreting
import pytest
import torch
from kernel_cases import KernelCase, expanded

from mla_backends.triton_ops.tuning import Tile

RAGGED = expanded((5, 1, 20, 40, 2), (5, 70, 20, 67, 33))


def check(case: KernelCase) -> None:
    assert case.wrong() == []


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ragged_segments(causal: bool, dtype: torch.dtype) -> None:
    check(RAGGED.but(causal=causal, dtype=dtype))


@pytest.mark.parametrize("tile", [Tile(32, 64, 4, 1), Tile(64, 16, 4, 2), Tile(128, 128, 8, 2)], ids=str)
def test_tiles_of_any_size(tile: Tile) -> None:
    check(RAGGED.but(tile=tile))


@pytest.mark.parametrize(
    "widths", [(128, 64, 128), (16, 8, 12), (64, 64, 96), (192, 64, 256), (128, 0, 100)], ids=str
)
@pytest.mark.parametrize("causal", [True, False])
def test_heads_of_any_width(widths: tuple[int, int, int], causal: bool) -> None:
    lengths = ((3, 20), (3, 33))
    check(expanded(*lengths, heads=2, widths=widths, causal=causal))


@pytest.mark.parametrize("heads", [1, 20])
def test_any_number_of_heads(heads: int) -> None:
    check(expanded((2, 17), (3, 18), heads=heads))


@pytest.mark.parametrize("causal", [True, False])
def test_what_is_empty_gives_zeros(causal: bool) -> None:
    """Segments without queries or keys, and queries before the first key."""
    check(expanded((0, 3, 20, 0, 2), (4, 0, 5, 0, 1), causal=causal))


def test_nobody_needs_the_log_sum_exp() -> None:
    check(RAGGED.but(with_lse=False))


def test_programs_in_any_order() -> None:
    with interpreting.shuffled(0):
        check(RAGGED)
