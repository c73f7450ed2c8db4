"""The codecs of the cache formats: bytes that were worked out by hand, what survives, what saturates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mla.cache.formats import (
    FORMATS,
    Codec,
    Format,
    codec_of,
    decode_slots,
    find_format,
    register,
    stored_format,
)
from mla.errors import CacheFormatError

WIDTHS = {"bf16": 1152, "fp16": 1152, "fp32": 2304, "fp8": 576, "fp8_ds_mla": 656, "fp8_ds_mla_any": 656,
          "int8": 584, "q8_0": 612}  # fmt: skip
QUANTISED = [name for name in WIDTHS if name not in ("bf16", "fp16", "fp32")]
POWERS = ("fp8", "fp8:0.25", "fp8_ds_mla")
SIZES = (0.0, 1e-42, 1e-30, 2.0**-13, 1e-3, 0.75, 1.0, 447.0, 448.0, 448.1, 464.0, 1e4)


def rows(seed: int, c: int = 512, r: int = 64, tokens: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Return kv and pe, whose tiles, and blocks, are of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, c + r, generator=draw)
    sizes = torch.tensor(SIZES)[torch.randint(len(SIZES), (tokens, (c + r + 31) // 32), generator=draw)]
    x = x * sizes.repeat_interleave(32, dim=1)[:, : c + r]
    return x[:, :c], x[:, c:]


def test_bytes_of_a_token() -> None:
    assert {name: entry.token_bytes() for name, entry in FORMATS.items()} == WIDTHS
    assert FORMATS["fp8_ds_mla"].token_bytes(512, 0) == 528
    assert all(entry.layout and entry.scale_rule and entry.deployed for entry in FORMATS.values())


@pytest.mark.parametrize(
    ("name", "codes", "scale", "decoded"),
    [
        ("fp8_ds_mla", [0x7A, 0x38], [0, 0, 0x80, 0x3F], [320.0, 1.0]),
        ("fp8_ds_mla_any", [0x7E, 0x3B], [0, 0, 0x40, 0x3F], [336.0, 1.03125]),
    ],
)
def test_a_tile_worked_out_by_hand(
    name: str, codes: list[int], scale: list[int], decoded: list[float]
) -> None:
    kv, pe = torch.zeros(1, 512), torch.zeros(1, 64)
    kv[0, 5:7] = torch.tensor([336.0, 1.0])
    pe[0, 1] = 1.0
    codec = codec_of(name, 512, 64)
    stored = codec.encode(kv, pe)
    assert [stored[0, 5:7].tolist(), stored[0, 512:516].tolist()] == [codes, scale]
    assert stored[0, 528:532].tolist() == [0, 0, 0x80, 0x3F]
    assert codec.decode(stored)[0][0, 5:7].tolist() == decoded


def test_ggml_blocks_worked_out_by_hand() -> None:
    """Halves round away from zero; the scale is a float16 before its block."""
    kv = torch.zeros(1, 64)
    kv[0, 32:36] = torch.tensor([127.0, 0.5, -2.5, 1.25])
    stored = codec_of("q8_0", 64, 0).encode(kv, kv[:, :0])
    assert stored[0, :34].tolist() == [0] * 34
    assert stored[0, 34:40].tolist() == [0, 0x3C, 127, 1, 256 - 3, 1]


def test_every_code_of_e4m3_is_decoded() -> None:
    """By its definition: sign, four bits of exponent with bias 7, three of the number; all ones is NaN."""
    codes = torch.arange(256, dtype=torch.uint8)
    exponent, rest = codes >> 3 & 15, (codes & 7).double()
    size = torch.where(exponent > 0, 2.0 ** (exponent - 7.0) * (1 + rest / 8), 2.0**-9 * rest)
    size[torch.tensor([127, 255])] = torch.nan
    kv, pe = codec_of("fp8:0.25", 192, 64).decode(codes[None])
    truth = 0.25 * torch.where(codes < 128, size, -size)
    torch.testing.assert_close(torch.cat((kv, pe), dim=1)[0].double(), truth, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("tokens", [0, 1, 2048, 5000])
def test_rows_that_are_decoded_some_at_a_time(name: str, tokens: int) -> None:
    codec = codec_of(name, 128, 32)
    stored = codec.encode(*rows(3, 128, 32, 5000))
    slots = torch.randperm(5000, generator=torch.Generator().manual_seed(4))[:tokens]
    out = torch.full((tokens, 160), torch.nan, dtype=torch.bfloat16)
    decode_slots(codec, stored, slots, out)
    assert torch.equal(out, torch.cat(codec.decode(stored), dim=1)[slots].bfloat16())


def test_int8_scales_are_of_latent_and_key() -> None:
    kv, pe = torch.full((1, 8), 127.0), torch.full((1, 4), 254.0)
    stored = codec_of("int8", 8, 4).encode(kv, pe)
    assert stored[0, :12].tolist() == [127] * 12
    assert stored[0, 12:].view(torch.float32).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("name", [*WIDTHS, "fp8:0.25"])
@settings(deadline=None)
@given(seed=st.integers(0, 2**20))
def test_what_is_stored_is_near_and_stays(name: str, seed: int) -> None:
    """Errors are within half of what the codec says; and what a power of two scaled is stored as it was."""
    kv, pe = rows(seed)
    codec = codec_of(name, 512, 64)
    stored = codec.encode(kv, pe)
    decoded = codec.decode(stored)
    limit = {"fp8": 448.0, "fp8:0.25": 112.0, "fp16": 65504.0}.get(name, torch.inf)
    for x, kept in zip((kv, pe), decoded, strict=True):
        assert kept.dtype == torch.float32
        assert kept.isfinite().all()
        x = x.clamp(-limit, limit)
        bound = codec.relative * x.abs() + codec.of_largest * x.abs().amax(1, keepdim=True) + codec.least
        assert ((kept - x).abs() <= 0.5001 * bound).all()
    if name in POWERS:
        again = codec.decode(codec.encode(*decoded))
        assert all(map(torch.equal, again, decoded))
        assert torch.equal(codec.encode(*(part.bfloat16() for part in decoded)), codec.encode(*decoded))


@pytest.mark.parametrize("name", QUANTISED)
def test_rows_of_zeros_and_no_rows(name: str) -> None:
    codec = codec_of(name, 512, 64)
    zeros = torch.zeros(3, 512), torch.zeros(3, 64)
    assert all((part == 0).all() for part in codec.decode(codec.encode(*zeros)))
    assert codec.encode(zeros[0][:0], zeros[1][:0]).shape == (0, codec.token_bytes)
    if name == "fp8_ds_mla":
        assert codec.encode(*zeros)[0, 512:516].view(torch.float32).item() == 2.0**-13


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_odd_numbers_harm_no_others(name: str, odd: float) -> None:
    kv, pe = rows(3)
    kv[1, 200], pe[1, 3] = odd, odd
    codec = codec_of(name, 512, 64)
    decoded, usual = codec.decode(codec.encode(kv, pe)), codec.decode(codec.encode(*rows(3)))
    others = torch.arange(9) != 1
    for part, as_ever in zip(decoded, usual, strict=True):
        assert torch.equal(part[others], as_ever[others])
    if odd == odd:
        assert not any(part.isnan().any() for part in decoded)
        assert decoded[0][1, 200].sign() == torch.tensor(odd).sign()
    else:  # it is where it was, or 0
        assert (decoded[0][1].isnan().nonzero().flatten().tolist() or [200]) == [200]


@pytest.mark.parametrize("ulps", [-1, 0, 1])
@pytest.mark.parametrize("power", [-3, 0, 5])
def test_the_largest_number_on_a_border_of_scales(ulps: int, power: int) -> None:
    """The scale doubles as soon as the largest number is above 448 times a power of two."""
    largest = torch.tensor(448.0 * 2.0**power)
    kv = torch.full((1, 128), (largest.view(torch.int32) + ulps).view(torch.float32).item())
    stored = codec_of("fp8_ds_mla", 128, 0).encode(kv, kv[:, :0])
    assert stored[0, 128:].view(torch.float32).item() == 2.0 ** (power + (ulps > 0))


def test_names_of_formats() -> None:
    assert stored_format(None, torch.bfloat16) == stored_format("bf16", torch.bfloat16) == ""
    assert stored_format("bf16", torch.float32) == "bf16"
    assert find_format("fp8:0.5").codec(8, 4).encode(torch.ones(1, 8), torch.ones(1, 4))[0, 0] == 0x40
    for name, said in (
        ("fp8_ds", "unknown cache format 'fp8_ds'. Did you mean 'fp8_ds_mla'?"),
        ("int8:2", "takes no scale: leave ':2' out"),
        ("fp8:0", "must be a positive number from 1.2e-38 to 7.5e35, got '0'"),
        ("fp8:x", "must be a positive number from 1.2e-38 to 7.5e35, got 'x'"),
        ("bf16:2", "'bf16' takes no scale: leave ':2' out"),
        ("fp8:1e-50", "got '1e-50'"),  # 0 in float32: zeros became NaN
        ("fp8:1e36", "got '1e36'"),  # 448 of it are infinite
    ):
        with pytest.raises(CacheFormatError) as error:
            stored_format(name, torch.bfloat16)
        assert said in str(error.value)
    with pytest.raises(CacheFormatError, match="stores 32 numbers together"):
        codec_of("q8_0", 40, 8)


class TimesTheInverse(TorchDispatchMode):
    """Divides by a number of the host as a GPU does: times its rounded inverse."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.div.Tensor and getattr(args[1], "ndim", 0) == 0:
            return args[0] * torch.tensor(1.0).div(float(args[1])).item()
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", [*QUANTISED, "fp8:0.3"])
def test_devices_encode_the_bytes_of_the_host(name: str) -> None:
    codec = codec_of(name, 512, 64)
    kv, pe = rows(3, tokens=64)
    right = codec.encode(kv, pe)
    with TimesTheInverse():
        assert torch.equal(codec.encode(kv, pe), right)


@dataclass(frozen=True)
class Halves(Codec):
    """A toy: float16 of half of every number."""

    relative = 2.0**-10
    least = 2.0**-24

    @property
    def token_bytes(self) -> int:
        return 2 * (self.c + self.r)

    def encode(self, kv: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
        return (torch.cat((kv, pe), dim=1) / 2).half().view(torch.uint8)

    def decode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kv, pe = (2 * rows.view(torch.float16).float()).split((self.c, self.r), dim=1)
        return kv, pe


def test_a_format_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry and one codec."""
    monkeypatch.setattr("mla.cache.formats.FORMATS", dict(FORMATS))
    entry = register(Format("halves", Halves))
    assert find_format("halves") is entry
    assert entry.token_bytes(32, 8) == 80
    with pytest.raises(ValueError, match="there is a cache format 'halves' already"):
        register(entry)
    with pytest.raises(ValueError, match="needs a name without spaces"):
        register(Format("a:b", Halves))


def test_a_format_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any process finds it, and says in a sentence what is wrong with it."""
    monkeypatch.setattr("mla.cache.formats.FORMATS", dict(FORMATS))
    (tmp_path / "halving.py").write_text(
        "from mla.cache.formats import FlatFp8, Format\nentry = Format('halving', FlatFp8)\n"
    )
    info = tmp_path / "halving-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halving\nVersion: 1\n")
    points = "[mla.cache_formats]\nhalving = halving:entry\nbroken = halving:missing\n"
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    assert find_format("halving").token_bytes() == 576
    with pytest.raises(CacheFormatError, match=r"'broken' cannot be loaded from halving:missing: .*missing"):
        find_format("broken")
