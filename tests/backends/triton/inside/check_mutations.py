"""Every mistake in a kernel turns a check red, and the kernels as they are turn none."""

from __future__ import annotations

from pathlib import Path

import interpreting
import mutants
import pytest
import torch
from format_cases import E4M3Case, FormatCase
from kernel_cases import (
    BestCase,
    FarWrite,
    KernelCase,
    expanded,
    latent,
    norm,
    rotation,
    select,
    sparse,
    write,
)
from mutating import Mutant

from mla_backends.triton_ops.attention import Splits
from mla_backends.triton_ops.tuning import Tile

Case = KernelCase | BestCase | FarWrite | E4M3Case | FormatCase

FAR_STRIDE = 1_100_000_000  # the third row is beyond 32 bits
NARROW_WIDTHS = {"latent": 48, "rope": 8}
LATENT = (
    latent((1, 1, 1), (1, 33, 70), heads=20, page_size=3, splits=Splits(32, 3), **NARROW_WIDTHS),
    latent((1, 1), (49, 64), heads=2, page_size=32, splits=Splits(20, 4), gain=100.0, **NARROW_WIDTHS),
    latent((2, 3, 0, 2), (1, 40, 0, 30), heads=12, page_size=1, **NARROW_WIDTHS),
    latent((2, 1), (600, 3), heads=6, splits=Splits(16, 40), halves=False, gain=4.0, **NARROW_WIDTHS),
    latent((1,), (20,), heads=1, page_size=1, far=True),
    latent((1,), (70,), heads=1, page_size=64, far=True),
    latent((3,), (5,), heads=1, apart=FAR_STRIDE, **NARROW_WIDTHS),
    # As of a captured step that grew, with channels for two programs of the merge.
    latent((1, 1), (200, 33), heads=2, splits=Splits(16, 5), latent=300, rope=8),
    latent((1, 1), (33 * 16, 65 * 16), heads=4, splits=Splits(16, 65), gain=3.0, **NARROW_WIDTHS),
    latent((1,), (4096,), heads=2, page_size=64, splits=Splits(1 << 20, 1), **NARROW_WIDTHS),
    latent((1,), (40,), heads=66, tile=Tile(64, 32, 8, 2), **NARROW_WIDTHS),
)
EXPANDED = (
    expanded((5, 1, 20), (5, 70, 33), heads=2, widths=(16, 8, 12)),
    expanded((2, 3), (40, 1), heads=2, widths=(16, 8, 12), causal=False),
    expanded((3, 2), (1, 20), heads=2, widths=(16, 8, 12)),
    expanded((3,), (3,), heads=1, widths=(16, 8, 12), apart=FAR_STRIDE),
)
SMALL = (
    norm(3, 100),
    rotation(2, 3),
    rotation(2, 20, width=24, interleaved=False),
    rotation(2, 40, width=24, joined=True),
    write(5, latent=100, rope=8),
    norm(8, 1536),
    FarWrite(write(3).case),
)
FORMATS = (
    E4M3Case(),
    FormatCase("fp8:0.3", 320, 32),
    FormatCase("fp8_ds_mla", 320, 32),
    FormatCase("fp8_ds_mla_any", 320, 32),
    FormatCase("int8", 320, 32),
    FormatCase("int8", 32, 0),
    FormatCase("q8_0", 96, 32),
)
HALVED = latent((2, 1), (50, 33), heads=4, latent=512, rope=64, gain=100.0, splits=Splits(32, 2))
STORED = (
    HALVED.stored("fp8_ds_mla"),
    HALVED.but(page_size=3).stored("int8"),
    HALVED.stored("fp8_ds_mla_any"),
    HALVED.stored("fp8:0.3"),
    write(5, latent=128, rope=8).stored("fp8_ds_mla"),
)
SELECTING = (
    sparse((1, 0, 2), (33, 5, 70), 24, heads=2, page_size=4, splits=Splits(16, 2), latent=48),
    sparse((2, 1), (9, 40), 20, heads=2, page_size=64, splits=Splits(1 << 20, 1), latent=48),
)
TIES = torch.tensor([1.5, -2.0, 0.0, 1.5, 7.0, 0.0, 1.5, 2.0**-30] * 40)
INDEXED = (
    select((3, 1, 2), (70, 9, 130), 20, page_size=4),
    select((3, 1, 2), (70, 9, 130), 20, page_size=4, by_torch=True),
    select((1, 1, 2), (20, 9, 30), 8, page_size=16, by_torch=True),  # scores of all tokens fill their memory
    select((1, 2), (130, 40), 24, page_size=16, index_format="fp8", token_bytes=52, selection="clustered"),
    BestCase(torch.randn(4, 300, generator=torch.Generator().manual_seed(0)), (300, 40, 23, 41), 40),
    BestCase(torch.stack((TIES, -TIES, TIES.flip(0))), (320, 311, 270), 90),
    BestCase(1 + 2.0**-23 * (torch.arange(200.0)[None] * 89 % 200), (200,), 77),
)
MUTANTS: list[tuple[Mutant, tuple[Case, ...]]] = [
    *((mutant, LATENT) for mutant in mutants.LATENT),
    *((mutant, SELECTING) for mutant in mutants.SELECTED),
    *((mutant, INDEXED) for mutant in mutants.SELECTION),
    *((mutant, (*LATENT, *EXPANDED)) for mutant in (*mutants.SOFTMAX, *mutants.PLACES)),
    *((mutant, EXPANDED) for mutant in mutants.EXPANDED),
    *((mutant, SMALL) for mutant in mutants.SMALL),
    *((mutant, (*FORMATS, *STORED)) for mutant in mutants.FORMATS),
    *((mutant, STORED) for mutant in mutants.STORED),
]


def caught(cases: tuple[Case, ...]) -> bool:
    """Return whether a case shows a mistake: a wrong result, or a fault. Anything else is raised."""
    try:
        return any(case.wrong() for case in cases)
    except interpreting.KernelFault:
        return True


@pytest.mark.parametrize(("mutant", "cases"), MUTANTS, ids=lambda given: getattr(given, "name", ""))
def test_a_mistake_is_caught(mutant: Mutant, cases: tuple[Case, ...], tmp_path: Path) -> None:
    with mutant.installed(tmp_path):
        assert caught(cases)


def test_kernels_without_a_mistake_pass(tmp_path: Path) -> None:
    with Mutant("nothing", "latent", old='"""\n\nimport', new='"""\n\nimport').installed(tmp_path):
        assert not caught((*LATENT, *SELECTING, *INDEXED, *EXPANDED, *SMALL, *FORMATS, *STORED))


def test_a_mistake_that_the_source_has_no_place_for_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(LookupError, match=r"latent\.py has this 0 times"),
        Mutant("gone", "latent", old="no such text", new="").installed(tmp_path),
    ):
        pass
