"""What kernels read and write of formats of the cache, against their codecs."""

from __future__ import annotations

import pytest
from format_cases import E4M3Case, FormatCase
from kernel_cases import FORMATS, write

from mla_backends.triton_ops.launcher import CACHE_FORMATS

WIDTHS = [(512, 64), (512, 0), (320, 32), (32, 32), (256, 96)]
BOTH = pytest.mark.parametrize("native", [False, True], ids=["integers", "native"])


@BOTH
def test_e4m3(native: bool) -> None:
    assert E4M3Case(native).wrong() == []


@BOTH
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_of_the_codec(name: str, widths: tuple[int, int], native: bool) -> None:
    assert FormatCase(name, *widths, native).wrong() == []


@BOTH
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_latents_are_written(name: str, interleaved: bool, native: bool) -> None:
    for sizes in ({}, {"latent": 96, "rope": 32}):
        assert write(9, **sizes, interleaved=interleaved, native=native).stored(name).wrong() == []


def test_every_format_is_tried() -> None:
    assert {name.partition(":")[0] for name in CACHE_FORMATS} == {name.partition(":")[0] for name in FORMATS}
