"""Ops that write or read a format of the cache as kernels get it wrong, and right ones like them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mla.cache.formats import FORMATS, Codec, TiledFp8, codec_of
from mla.reference import REFERENCE
from mla.reference.small import rms_norm, rotate

Tensor = torch.Tensor
Write, Latent = (type(REFERENCE[kind]) for kind in ("write_latent", "latent_attention"))
Spoil = Callable[[Codec, Tensor, Tensor], Tensor]  # codec, kv, pe -> rows of bytes


class Writes(Write):  # type: ignore[misc,valid-type]
    """Writes `encode(codec, kv, pe)`, of float32; with `rounded`, of what has been rounded to the dtype."""

    def __init__(self, name: str, encode: Spoil, rounded: bool = True) -> None:
        super().__init__((name,))
        self.encode, self.encodes_rounded = encode, rounded

    def __call__(self, *, cache_format: str = "", **given: Any) -> None:
        if not cache_format:
            super().__call__(**given)
            return
        c, angles = given["weight"].shape[0], given["cos_sin"]
        kv = rms_norm(given["kv_a"][:, :c], given["weight"], given["eps"])
        pe = rotate(given["kv_a"][:, c:], angles, given["interleaved"])
        if self.encodes_rounded:
            kv, pe = (part.to(given["kv_a"].dtype).float() for part in (kv, pe))
        codec = codec_of(cache_format, c, angles.shape[1])
        assert codec is not None
        given["cache"].flatten(0, 1)[given["slots"]] = self.encode(codec, kv, pe)


class Reads(Latent):  # type: ignore[misc,valid-type]
    """Attends bytes that `change(codec, rows)` has changed."""

    def __init__(self, name: str, change: Callable[[Codec, Tensor], Tensor]) -> None:
        super().__init__((name,))
        self.change = change

    def __call__(self, *leading: Any, cache: Tensor, cache_format: str = "", **given: Any) -> None:
        if cache_format:
            c = given["out"].shape[2]
            codec = codec_of(cache_format, c, given["q"].shape[2] - c)
            assert codec is not None
            cache = self.change(codec, cache.flatten(0, 1).clone()).view(cache.shape)
        super().__call__(*leading, cache=cache, cache_format=cache_format, **given)


def right(codec: Codec, kv: Tensor, pe: Tensor) -> Tensor:
    return codec.encode(kv, pe)


def moved(first: int, count: int, by: int) -> Callable[[Codec, Tensor], Tensor]:
    """Return what moves bytes [first, first + count) of every row around, counted from the latent's end."""

    def change(codec: Codec, rows: Tensor) -> Tensor:
        part = slice(codec.c + first, codec.c + first + count)
        rows[:, part] = rows[:, part].roll(by, 1)
        return rows

    return change


def spoilt(change: Callable[[Codec, Tensor], Tensor]) -> Spoil:
    return lambda codec, kv, pe: change(codec, codec.encode(kv, pe))


def other_rule(codec: Codec, kv: Tensor, pe: Tensor) -> Tensor:
    assert isinstance(codec, TiledFp8)
    return TiledFp8(codec.c, codec.r, not codec.powers).encode(kv, pe)


def rope_quantised(codec: Codec, kv: Tensor, pe: Tensor) -> Tensor:
    return codec.encode(kv, pe.clamp(-448, 448).to(torch.float8_e4m3fn).float())


def rounded_twice(dtype: torch.dtype) -> Spoil:
    return lambda codec, kv, pe: codec.encode(kv.to(dtype).float(), pe.to(dtype).float())


def saturates_to_nan(codec: Codec, kv: Tensor, pe: Tensor) -> Tensor:
    beyond = torch.cat((kv, pe), dim=1).abs() > 464
    return codec.encode(kv, pe).masked_fill(beyond, 0x7F)


def neighbour_tiles(codec: Codec, kv: Tensor, pe: Tensor) -> Tensor:
    """Scale every tile by the largest number of the one before it."""
    if codec.c % 128:
        return codec.encode(kv, pe)
    tiles = kv.unflatten(1, (-1, 128))
    largest = tiles.abs().amax(2, keepdim=True)
    rows = codec.encode(kv, pe)
    scales = codec.encode((tiles / largest * largest.roll(1, 1)).flatten(1), pe)
    rows[:, codec.c : codec.c + 4 * tiles.shape[1]] = scales[:, codec.c : codec.c + 4 * tiles.shape[1]]
    return rows


def truncated(codec: Codec, rows: Tensor) -> Tensor:
    """Read scales as powers of two, rounded towards zero."""
    scales = slice(codec.c, codec.c + 4 * -(-codec.c // 128))
    rows[:, scales] = (rows[:, scales].contiguous().view(torch.int32) & 0x7F800000).view(torch.uint8)
    return rows


def plain_rope(codec: Codec, rows: Tensor) -> Tensor:
    """Read the key as the latent's float8."""
    kv, pe = codec.decode(rows)
    return codec.encode(kv, pe.clamp(-448, 448).to(torch.float8_e4m3fn).float())


def swapped_halves(codec: Codec, rows: Tensor) -> Tensor:
    half = rows.shape[1] // 2
    return torch.cat((rows[:, half : 2 * half], rows[:, :half], rows[:, 2 * half :]), dim=1)


WRITES: list[tuple[str, Callable[[], Any]]] = [
    ("scales shifted", lambda: Writes("fp8_ds_mla_any", spoilt(moved(0, 16, 4)))),
    ("scales of the tile before", lambda: Writes("fp8_ds_mla_any", neighbour_tiles)),
    (
        "scales swapped",
        lambda: Writes("int8", lambda codec, kv, pe: moved(codec.r, 8, 4)(codec, codec.encode(kv, pe))),
    ),
    ("rule of the other kind", lambda: Writes("fp8_ds_mla", other_rule)),
    ("rule of the other kind, fused", lambda: Writes("fp8_ds_mla", other_rule, rounded=False)),
    ("rope quantised", lambda: Writes("fp8_ds_mla", rope_quantised)),
    ("rope quantised, fused", lambda: Writes("fp8_ds_mla", rope_quantised, rounded=False)),
    ("rounded twice by bf16", lambda: Writes("fp8_ds_mla", rounded_twice(torch.bfloat16))),
    (
        "rounded twice by bf16, fused",
        lambda: Writes("fp8_ds_mla", rounded_twice(torch.bfloat16), rounded=False),
    ),
    ("rounded twice by fp16", lambda: Writes("int8", rounded_twice(torch.float16))),
    ("saturates to NaN", lambda: Writes("fp8", saturates_to_nan)),
    ("q8_0 without its scale's rounding", lambda: Writes("q8_0", rounded_twice(torch.bfloat16))),
]
NARROW_WRITES: list[tuple[str, Callable[[], Any]]] = [  # in float32, scales of these are uncertain
    ("rule of the other kind, any", lambda: Writes("fp8_ds_mla_any", other_rule)),
]
READS: list[tuple[str, Callable[[], Any]]] = [
    ("scales shifted", lambda: Reads("fp8_ds_mla_any", moved(0, 16, 4))),
    ("scales truncated", lambda: Reads("fp8_ds_mla_any", truncated)),
    ("scales swapped", lambda: Reads("int8", lambda codec, rows: moved(codec.r, 8, 4)(codec, rows))),
    ("rope as float8", lambda: Reads("fp8_ds_mla", plain_rope)),
    ("halves swapped", lambda: Reads("q8_0", swapped_halves)),
]
RIGHT: list[Callable[[], Any]] = [
    *(
        lambda name=name, rounded=rounded: Writes(name, right, rounded)
        for name in FORMATS
        for rounded in (True, False)
    ),
    *(lambda name=name: Reads(name, lambda codec, rows: rows) for name in FORMATS),
]
