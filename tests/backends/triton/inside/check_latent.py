"""The kernels of `latent_attention`, against float64, in poisoned memory."""

from __future__ import annotations

import interpreting
import pytest
import torch
from kernel_cases import FORMATS, KernelCase, latent, sparse

from mla_backends.triton_ops.attention import Splits
from mla_backends.triton_ops.tuning import Tile

DECODE = latent((1, 1, 1, 1), (1, 17, 100, 257), latent=128)
LARGE = Tile(64, 64, 4, 2)
EMPTY = latent((1, 0, 2, 1, 0), (0, 0, 5, 33, 20), splits=Splits(16, 3))
# Two tokens of which the first sees nothing, three of which two do, and one that is beyond its first tile.
UNSEEING = latent((2, 3, 1), (1, 1, 40), heads=20, splits=Splits(16, 3))
SEVERAL = latent((2, 1, 3), (70, 33, 5), heads=20)


def check(case: KernelCase) -> None:
    assert case.wrong() == []


@pytest.mark.parametrize("page", [1, 16, 64, 3])
@pytest.mark.parametrize("splits", [Splits(1 << 20, 1), Splits(64, 5)], ids=["whole", "split"])
def test_pages_of_any_size(page: int, splits: Splits) -> None:
    check(DECODE.but(page_size=page, splits=splits))


@pytest.mark.parametrize("tile", [Tile(64, 32, 8, 2), Tile(32, 128, 4, 1)], ids=str)
@pytest.mark.parametrize("page", [1, 32, 64])
def test_tiles_of_any_size(tile: Tile, page: int) -> None:
    check(SEVERAL.but(tile=tile, page_size=page, splits=Splits(32, 3)))


@pytest.mark.parametrize(
    ("heads", "tokens"), [(1, 1), (1, 3), (8, 2), (12, 3), (20, 1), (40, 2), (96, 1), (96, 3)]
)
def test_any_number_of_heads_and_of_new_tokens(heads: int, tokens: int) -> None:
    tile = SEVERAL.tile if heads < 40 else LARGE
    check(latent((tokens, 1), (66, tokens), heads=heads, tile=tile))


@pytest.mark.parametrize("widths", [(512, 64), (256, 64), (512, 0), (48, 8), (100, 24), (16, 0)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "halves"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)], ids=str
)
def test_latents_of_any_width(widths: tuple[int, int], dtype: torch.dtype, halves: bool) -> None:
    case = latent(
        (2, 1), (50, 33), heads=4, latent=widths[0], rope=widths[1], dtype=dtype, splits=Splits(32, 2)
    )
    check(case.but(halves=halves))


@pytest.mark.parametrize("splits", [Splits(n, -(-257 // n)) for n in (16, 48, 100, 256)], ids=str)
def test_any_number_of_parts(splits: Splits) -> None:
    check(DECODE.but(splits=splits))


def test_more_parts_than_the_merge_takes_in_one_step() -> None:
    check(latent((1, 2), (1300, 3), heads=2, latent=48, rope=8, splits=Splits(16, 82)))


def test_parts_without_keys() -> None:
    """More parts than tiles: what is behind the last key is merged all the same."""
    check(latent((1,), (49,), heads=2, tile=Tile(16, 64, 4, 1), splits=Splits(16, 4)))


@pytest.mark.parametrize("case", [EMPTY, UNSEEING], ids=["requests", "rows"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "split"])
def test_what_is_empty_gives_zeros(case: KernelCase, whole: bool) -> None:
    check(case.but(splits=Splits(1 << 20, 1) if whole else case.splits))


@pytest.mark.parametrize("case", [DECODE, UNSEEING], ids=["decode", "several"])
def test_large_logits(case: KernelCase) -> None:
    """Weights beyond what fp32 holds without a maximum, in one part and between parts."""
    check(case.but(gain=200.0, splits=Splits(32, 9)))


@pytest.mark.parametrize("case", [DECODE, EMPTY], ids=["decode", "empty"])
def test_nobody_needs_the_log_sum_exp(case: KernelCase) -> None:
    check(case.but(with_lse=False, splits=Splits(32, 9)))


@pytest.mark.parametrize("planned", [(257, 257, 257, 257), (1, 1, 1, 1), (0, 257, 0, 3)], ids=str)
@pytest.mark.parametrize("splits", [Splits(32, 9), Splits(100, 3), None], ids=str)
def test_lengths_that_change_after_planning(planned: tuple[int, ...], splits: Splits | None) -> None:
    """A captured call follows them, up to the width of the block table."""
    check(DECODE.but(planned=planned, splits=splits))


def test_requests_that_become_empty() -> None:
    check(EMPTY.but(planned=(40, 20, 33, 5, 1)))


@pytest.mark.parametrize("page", [1, 64])
def test_a_cache_beyond_32_bits(page: int) -> None:
    check(latent((1, 2), (150, 20), page_size=page, far=True, splits=Splits(64, 3)))


@pytest.mark.parametrize("seed", [0, 1])
def test_programs_in_any_order(seed: int) -> None:
    with interpreting.shuffled(seed):
        check(UNSEEING.but(kv_lens=(70, 1, 200), splits=Splits(16, 13)))


@pytest.mark.parametrize("kv_lens", [(1500,), (1500, 700), (40, 1100, 3)], ids=str)
def test_splits_that_the_op_chooses_itself(kv_lens: tuple[int, ...]) -> None:
    check(latent((1,) * len(kv_lens), kv_lens, heads=4, page_size=64, tile=LARGE))


@pytest.mark.parametrize("widths", [(512, 64), (96, 32)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "halves"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)], ids=str
)
@pytest.mark.parametrize("name", FORMATS)
def test_every_cache_format(name: str, widths: tuple[int, int], dtype: torch.dtype, halves: bool) -> None:
    """Held to the decoded numbers, with logits in the hundreds: nothing is added to the usual bound."""
    sizes = {"latent": widths[0], "rope": widths[1], "dtype": dtype, "gain": 100.0}
    case = latent((2, 1), (50, 33), heads=4, splits=Splits(32, 2), **sizes)
    check(case.but(halves=halves, native=not halves).stored(name))


@pytest.mark.parametrize("page", [1, 64])
@pytest.mark.parametrize("name", ["fp8_ds_mla", "int8"])
def test_a_cache_of_bytes_beyond_32_bits(name: str, page: int) -> None:
    check(latent((1, 2), (150, 20), page_size=page, far=True, splits=Splits(64, 3)).stored(name))


# -------------------------------------------------------------------------------------------- selections
# Contexts within the selection and beyond it, a request without new tokens, and tokens that see little.
SELECTING = sparse((2, 0, 3, 1), (70, 9, 4, 33), 24, heads=20)


@pytest.mark.parametrize("page", [1, 16, 64, 3])
@pytest.mark.parametrize("splits", [Splits(1 << 20, 1), Splits(16, 2)], ids=["whole", "split"])
def test_selections_in_pages_of_any_size(page: int, splits: Splits) -> None:
    check(SELECTING.but(page_size=page, splits=splits))


@pytest.mark.parametrize("topk", [1, 16, 33, 80])
@pytest.mark.parametrize("tile", [Tile(16, 32, 4, 1), LARGE], ids=str)
def test_selections_of_any_width(topk: int, tile: Tile) -> None:
    check(SELECTING.but(topk=topk, tile=tile, splits=Splits(32, 3)))


@pytest.mark.parametrize("how", ["recent", "clustered", "tied"])
def test_selections_of_any_kind(how: str) -> None:
    check(SELECTING.but(selection=how, num_heads=1))


def test_tokens_that_select_nothing_give_zeros() -> None:
    check(sparse((2, 1), (1, 40), 16, splits=Splits(16, 1)))


def test_parts_of_a_selection_without_keys() -> None:
    check(sparse((3,), (66,), 66, tile=Tile(16, 16, 4, 1), splits=Splits(16, 5)))


@pytest.mark.parametrize("planned", [(3, 0, 3, 1), (200, 9, 40, 33)], ids=str)
def test_selections_of_lengths_that_change_after_planning(planned: tuple[int, ...]) -> None:
    check(SELECTING.but(planned=planned))


@pytest.mark.parametrize("name", FORMATS)
def test_selections_of_a_formatted_cache(name: str) -> None:
    check(SELECTING.but(splits=Splits(16, 2)).stored(name))


def test_selections_of_a_cache_beyond_32_bits() -> None:
    check(sparse((1, 2), (150, 20), 64, far=True, page_size=64, splits=Splits(32, 2)))


def test_a_selection_is_split_as_the_op_chooses_itself() -> None:
    check(sparse((1,), (1500,), 1024, heads=4, tile=LARGE))
