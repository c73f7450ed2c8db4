"""Formats of the latent cache: what the bytes of one token of one layer are.

A format is an entry of `FORMATS`: data for people, and a codec, which is the definition of its bytes. Fused
ops claim formats by name (`FusedOp.cache_formats`), and are judged by the codec. `register` adds a format
to a process; an entry point of the group `mla.cache_formats` adds it wherever its package is installed.

A name may end with the one scale of a flat format, as in "fp8:0.05".
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import ClassVar

import torch
from torch.nn.functional import pad

from mla.errors import CacheFormatError, did_you_mean
from mla.text import DTYPES
from mla_backends.errors import describe

E4M3_MAX, E4M3 = 448.0, torch.float8_e4m3fn
E4M3_NUMBERS = torch.arange(256, dtype=torch.uint8, device="cpu").view(E4M3).float()  # of every code
ROWS_AT_ONCE = 2048  # that a CPU decodes: larger temporaries would be mapped anew, page by page
TILE, Q8_BLOCK = 128, 32  # numbers that share a scale
LEAST_RATIO = 1e-4  # of the largest number of a tile and 448, in power-of-two scales
LEAST_SCALE = torch.finfo(torch.float32).tiny  # the least of other scales: a tile of zeros decodes to zeros

Rows = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Codec(ABC):
    """One format for latents of `c` and rotary keys of `r` numbers. Raises `CacheFormatError` for others.

    NaN stays NaN in formats that have it, and is 0 in others; it does not reach other numbers of the token.
    Numbers beyond the range saturate, and never become NaN. Those that share a scale with an infinity are 0,
    and where the scale is rounded up, the infinity may be given back.
    """

    c: int
    r: int

    # A stored number is at most this far from what was encoded, and half of it if no rounding came before:
    relative: ClassVar[float] = 0.0  # of its own size
    of_largest: ClassVar[float] = 0.0  # of the largest number that shares its scale
    least: ClassVar[float] = 0.0
    # Whether scales stay as they are where numbers change a little: one, or powers of two.
    steady: ClassVar[bool] = False
    joined: ClassVar[bool] = False  # whether numbers of the latent and of the key may share a scale

    @property
    @abstractmethod
    def token_bytes(self) -> int:
        """The bytes of a token."""

    @abstractmethod
    def encode(self, kv: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
        """Return the bytes [s, token_bytes] uint8 of kv [s, c] and pe [s, r], of any floating dtype."""

    @abstractmethod
    def decode(self, rows: torch.Tensor) -> Rows:
        """Return kv [s, c] and pe [s, r], float32, of bytes [s, token_bytes]."""

    def _multiple(self, numbers: int, of: int) -> None:
        if numbers % of:
            raise CacheFormatError(
                f"this cache format stores {of} numbers together: latents of {self.c} and keys of {self.r} "
                "do not fit it. Choose another one."
            )


@dataclass(frozen=True)
class Flat(Codec):
    """Numbers of one dtype, over one scale that is not stored."""

    dtype: torch.dtype = torch.bfloat16
    scale: float = 1.0

    @property
    def steady(self) -> bool:  # type: ignore[override]
        return self.dtype != torch.float32  # of which hardly any byte stays

    @property
    def token_bytes(self) -> int:
        return (self.c + self.r) * self.dtype.itemsize

    def encode(self, kv: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
        both = torch.cat((kv, pe), dim=1)
        return _bytes(_saturated(both if self.scale == 1 else _over(both.float(), self.scale), self.dtype))

    def decode(self, rows: torch.Tensor) -> Rows:
        numbers = _numbers(rows, self.dtype)
        kv, pe = (numbers if self.scale == 1 else numbers * self.scale).split((self.c, self.r), dim=1)
        return kv, pe

    @property
    def relative(self) -> float:  # type: ignore[override]
        return torch.finfo(self.dtype).eps

    @property
    def least(self) -> float:  # type: ignore[override]
        return torch.finfo(self.dtype).smallest_normal * self.relative * self.scale


FlatFp8 = partial(Flat, dtype=E4M3)


@dataclass(frozen=True)
class TiledFp8(Codec):
    """e4m3 of the latent, then a float32 scale for every 128 of it, then the key in bfloat16."""

    powers: bool = True  # scales are powers of two
    relative: ClassVar[float] = 2.0**-3
    of_largest: ClassVar[float] = 2.0**-16  # the scale is at most 2/448 of it
    least: ClassVar[float] = 2.0**-22

    def __post_init__(self) -> None:
        self._multiple(self.c, 4)  # so that scales are aligned

    @property
    def steady(self) -> bool:  # type: ignore[override]
        return self.powers

    @property
    def tiles(self) -> int:
        """The scales of a token."""
        return -(-self.c // TILE)

    @property
    def token_bytes(self) -> int:
        return self.c + 4 * self.tiles + 2 * self.r

    def encode(self, kv: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
        tiles = pad(kv.float(), (0, self.tiles * TILE - self.c)).unflatten(1, (self.tiles, TILE))
        ratio = _over(_largest(tiles), E4M3_MAX)
        scales = _power_above(ratio.clamp_min(LEAST_RATIO)) if self.powers else ratio.clamp_min(LEAST_SCALE)
        codes = _bytes(_saturated(tiles / scales[..., None], E4M3).flatten(1))[:, : self.c]
        return torch.cat((codes, _bytes(scales), _bytes(_saturated(pe, torch.bfloat16))), dim=1)

    def decode(self, rows: torch.Tensor) -> Rows:
        codes, scales, key = rows.split((self.c, 4 * self.tiles, 2 * self.r), dim=1)
        spread = _numbers(scales, torch.float32).repeat_interleave(TILE, dim=1)[:, : self.c]
        return _numbers(codes, E4M3) * spread, _numbers(key, torch.bfloat16)


@dataclass(frozen=True)
class Int8(Codec):
    """int8 of the latent and the key, then a float32 scale of each."""

    of_largest: ClassVar[float] = 1.0 / 127
    relative: ClassVar[float] = 2.0**-22  # of the scale's own rounding
    least: ClassVar[float] = LEAST_SCALE

    def __post_init__(self) -> None:
        self._multiple(self.c + self.r, 4)

    @property
    def token_bytes(self) -> int:
        return self.c + self.r + 8

    def encode(self, kv: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
        parts = [part.float() for part in (kv, pe)]
        scales = torch.stack([_over(_largest(part), 127).clamp_min(LEAST_SCALE) for part in parts], dim=1)
        codes = [_int8((part / scales[:, i : i + 1]).round()) for i, part in enumerate(parts)]
        return torch.cat((*map(_bytes, codes), _bytes(scales)), dim=1)

    def decode(self, rows: torch.Tensor) -> Rows:
        codes, scales = rows.split((self.c + self.r, 8), dim=1)
        kv, pe = _numbers(codes, torch.int8).split((self.c, self.r), dim=1)
        both = _numbers(scales, torch.float32)
        return kv * both[:, :1], pe * both[:, 1:]


@dataclass(frozen=True)
class Q8(Codec):
    """ggml's q8_0: for every 32 numbers a float16 scale, then as many int8. Halves round away from 0."""

    of_largest: ClassVar[float] = 1.0 / 127
    relative: ClassVar[float] = 2.0**-10  # the scale is rounded to float16 after the codes are chosen
    least: ClassVar[float] = 127 * 2.0**-24

    def __post_init__(self) -> None:
        self._multiple(self.c + self.r, Q8_BLOCK)

    @property
    def joined(self) -> bool:  # type: ignore[override]
        return self.c % Q8_BLOCK > 0

    @property
    def token_bytes(self) -> int:
        return (self.c + self.r) // Q8_BLOCK * (Q8_BLOCK + 2)

    def encode(self, kv: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
        blocks = torch.cat((kv, pe), dim=1).float().unflatten(1, (-1, Q8_BLOCK))
        scales = _over(_largest(blocks), 127)[..., None]
        ratio = blocks * torch.where(scales > 0, 1 / scales, 0.0)  # ggml multiplies
        whole = ratio.trunc()
        codes = _int8(whole + torch.where((ratio - whole).abs() >= 0.5, ratio.sign(), 0.0))
        return torch.cat((_bytes(_saturated(scales, torch.float16)), _bytes(codes)), dim=2).flatten(1)

    def decode(self, rows: torch.Tensor) -> Rows:
        scales, codes = rows.unflatten(1, (-1, Q8_BLOCK + 2)).split((2, Q8_BLOCK), dim=2)
        numbers = _numbers(codes, torch.int8) * _numbers(scales, torch.float16)
        kv, pe = numbers.flatten(1).split((self.c, self.r), dim=1)
        return kv, pe


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def _numbers(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers in bytes, in float32: of e4m3 on a CPU from a table, six times as fast."""
    if dtype == E4M3 and rows.device.type == "cpu":
        return E4M3_NUMBERS.index_select(0, rows.flatten().int()).view(rows.shape)
    if rows.shape[-1] == 0:  # which cannot be viewed
        return rows.float()
    return rows.clone(memory_format=torch.contiguous_format).view(dtype).float()  # aligned to the dtype


def _largest(x: torch.Tensor) -> torch.Tensor:
    """Return the largest size of a number in each row, NaN left out and infinity taken for the largest."""
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1])
    return x.abs().nan_to_num(nan=0.0).amax(-1)


def _over(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """Return x / divisor, rounded once: devices multiply by the inverse of a divisor that the host holds."""
    return x / x.new_full((), divisor).expand_as(x)


def _power_above(x: torch.Tensor) -> torch.Tensor:
    """Return the least power of two that is not below each normal, positive float32."""
    return ((x.view(torch.int32) + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)


def _saturated(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    limit = torch.finfo(dtype).max
    return x.float().clamp(-limit, limit).to(dtype)


def _int8(x: torch.Tensor) -> torch.Tensor:
    return x.nan_to_num(nan=0.0).clamp(-127, 127).to(torch.int8)


# ------------------------------------------------------------------------------------------ formats
@dataclass(frozen=True)
class Format:
    """A format as data. `codec(c, r)` makes its codec for latents of c and rotary keys of r numbers."""

    name: str
    codec: Callable[[int, int], Codec]
    layout: str = ""  # of a token, in order
    scale_rule: str = ""
    deployed: str = ""  # who writes it
    source: str = ""  # what was read

    def token_bytes(self, c: int = 512, r: int = 64) -> int:
        """Return the bytes of a token."""
        return self.codec(c, r).token_bytes


FORMATS: dict[str, Format] = {}
GROUP = "mla.cache_formats"  # entry points that name a `Format`, which every process then knows


def register(entry: Format) -> Format:
    """Add a format, and return it. Raises ValueError for a name that is taken, or that is none."""
    if not entry.name.isprintable() or not entry.name or {":", ",", " ", "="} & set(entry.name):
        raise ValueError(f"a cache format needs a name without spaces, ':', ',' and '=', got {entry.name!r}.")
    if entry.name in FORMATS:
        raise ValueError(f"there is a cache format '{entry.name}' already: choose another name.")
    FORMATS[entry.name] = entry
    return entry


def _load_installed(name: str) -> None:
    """Register the format that an installed package names so, if one does. Raises `CacheFormatError`."""
    for point in metadata.entry_points(group=GROUP, name=name):
        try:
            entry = point.load()
            if name not in FORMATS:  # importing it may have registered it
                register(entry)
        except Exception as error:  # what a package raises is not the user's to debug
            raise CacheFormatError(
                f"cache format '{name}' cannot be loaded from {point.value}: {describe(error)}."
            ) from error


def find_format(name: str) -> Format:
    """Return the format of a name, "fp8:0.05" being fp8 over that scale. Raises `CacheFormatError`."""
    if not isinstance(name, str):
        raise CacheFormatError(f"unknown cache format {name!r}. Formats: {', '.join(FORMATS)}.")
    base, colon, scale = name.partition(":")
    if base not in FORMATS:
        _load_installed(base)
    if base not in FORMATS:
        raise CacheFormatError(
            f"unknown cache format '{name}'.{did_you_mean(base, [*FORMATS])} Formats: {', '.join(FORMATS)}."
        )
    entry = FORMATS[base]
    if not colon:
        return entry
    if entry.codec is not FlatFp8:
        raise CacheFormatError(f"cache format '{base}' takes no scale: leave ':{scale}' out.")
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not LEAST_SCALE <= number <= torch.finfo(torch.float32).max / E4M3_MAX:  # 448 times it is finite
        raise CacheFormatError(
            f"the scale of a cache format must be a positive number from 1.2e-38 to 7.5e35, got '{scale}'."
        )
    return replace(entry, name=name, codec=partial(FlatFp8, scale=number))


def codec_of(name: str, c: int, r: int) -> Codec | None:
    """Return the codec of a format for these widths; None for "", the plain cache.

    Raises `CacheFormatError`.
    """
    return find_format(name).codec(c, r) if name else None


def given_back(codec: Codec, kv: torch.Tensor, pe: torch.Tensor) -> Rows:
    """Return kv [s, c] and pe [s, r] as a cache of this format gives them back, in float32."""
    return codec.decode(codec.encode(kv, pe))


def format_error(codec: Codec | None) -> float:
    """Return the relative error of numbers N(0, 1) that a cache gives back; 0 for the plain cache."""
    if codec is None:
        return 0.0
    draw = torch.Generator().manual_seed(0)
    numbers = [torch.randn(64, width, generator=draw) for width in (codec.c, codec.r)]
    gaps = [kept - x for kept, x in zip(given_back(codec, *numbers), numbers, strict=True)]
    gap, size = (torch.cat(parts, dim=1).norm().item() for parts in (gaps, numbers))
    return gap / size


def decode_slots(codec: Codec, rows: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """Decode rows [n, token_bytes] uint8 at `slots` [s] into out [s, c + r], of any floating dtype."""
    size = ROWS_AT_ONCE if out.device.type == "cpu" else max(1, out.shape[0])
    for some, part in zip(slots.split(size), out.split(size), strict=True):
        torch.cat(codec.decode(rows.index_select(0, some)), dim=1, out=part)


def latents(rows: torch.Tensor, codec: Codec | None) -> torch.Tensor:
    """Return latents and keys [.., c + r], in float32, of rows [.., w] of a cache."""
    if codec is None:
        return rows.float()
    return torch.cat(codec.decode(rows.flatten(0, -2)), dim=1).unflatten(0, rows.shape[:-1])


def stored_format(name: str | None, dtype: torch.dtype) -> str:
    """Return the format that specs of a layer in `dtype` name: "" where it is plain numbers of that dtype.

    Raises `CacheFormatError` for an unknown name.
    """
    if not name or (name in DTYPES and getattr(torch, DTYPES[name]) == dtype):
        return ""
    return find_format(name).name


_TILED = "c e4m3 latent, a float32 scale for every 128 of it, r bfloat16 rotary key"
for _entry in (
    *(
        Format(_short, partial(Flat, dtype=getattr(torch, _long)), f"c + r {_long}", "none", "every engine")
        for _short, _long in DTYPES.items()
    ),
    Format(
        "fp8", FlatFp8, "c e4m3 latent, r e4m3 rotary key", "one for all tokens: 1, or that of the name",
        deployed="vLLM, FlashInfer, FlashMLA (dense), TensorRT-LLM",
        source="vLLM 0.33.0, concat_and_cache_mla; sgl-flash-mla 1.0.0",
    ),
    Format(
        "fp8_ds_mla", TiledFp8, _TILED, "2^ceil(log2(max(amax / 448, 1e-4)))",
        deployed="vLLM since September 2026, FlashMLA (sparse)",
        source="vLLM 0.33.0, flashmla_sparse.py; FlashMLA 9241ae3, tests/quant.py",
    ),
    Format(
        "fp8_ds_mla_any", partial(TiledFp8, powers=False), _TILED, "amax / 448, and 2^-126 at least",
        deployed="SGLang, vLLM before September 2026", source="SGLang 0.5.23, dsa_quant_k_cache.py",
    ),
    Format(
        "int8", Int8, "c int8 latent, r int8 rotary key, float32 scales of latent and key",
        "amax / 127 of a token, and 2^-126 at least",
        deployed="ixformer, which keeps the scales in a tensor of their own",
        source="ixformer, ref_vllm_paged_attention_mla_int8",
    ),
    Format(
        "q8_0", Q8, "for every 32 numbers of latent and rotary key: a float16 scale, 32 int8",
        "amax / 127 of a block, rounded to float16 behind the codes",
        deployed="llama.cpp, ik_llama.cpp", source="ggml, quantize_row_q8_0_ref",
    ),
):  # fmt: skip
    register(_entry)


# ------------------------------------------------------------------------------------ index formats
# Formats of the index cache: what the bytes of one page of index keys are.
#
# They split pages: the values of all tokens come first, and then their scales. So a row of the flattened
# cache is no token's, unless a page holds one.
LEAST_AMAX = 1e-4  # the largest number of a key is taken for it where that is smaller
SCALE_BYTES = 4


@dataclass(frozen=True)
class IndexFp8(Codec):
    """e4m3 of a key's c channels over a power of two, 2^ceil(log2(max(amax, 1e-4) / 448)), in float32.

    As DeepSeek-V3.2 (`act_quant`), vLLM 0.33 and DeepGEMM store it. There is no second part: r is 0.
    """

    r: int = 0
    relative: ClassVar[float] = 2.0**-3
    of_largest: ClassVar[float] = 2.0**-16  # the scale is at most 2/448 of it
    least: ClassVar[float] = 2.0**-30
    steady: ClassVar[bool] = True

    @property
    def token_bytes(self) -> int:
        """The bytes of a token, wherever in its page they are."""
        return self.c + SCALE_BYTES

    def encode(self, kv: torch.Tensor, pe: torch.Tensor | None = None) -> torch.Tensor:
        """Return rows [s, c + 4] uint8, codes and then the scale, of keys [s, c] of any floating dtype."""
        wide = kv.float()
        largest = _largest(wide).clamp(LEAST_AMAX, torch.finfo(torch.float32).max)
        scales = _power_above(_over(largest, E4M3_MAX).clamp_min(LEAST_SCALE))[:, None]
        return torch.cat((_bytes(_saturated(wide / scales, E4M3)), _bytes(scales)), dim=1)

    def decode(self, rows: torch.Tensor) -> Rows:
        """Return keys [s, c] float32, and nothing [s, 0], of rows [s, c + 4]."""
        keys = index_keys(rows[:, None].contiguous(), self)[:, 0]  # a token is a page of one
        return keys, keys[:, :0]

    def given_back(self, keys: torch.Tensor) -> torch.Tensor:
        """Return keys [s, c] as a cache gives them back, in float32."""
        return self.decode(self.encode(keys))[0]

    def parts(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of pages [p, page, c + 4] uint8: codes [p, page, c], scales [p, page, 4]."""
        count, page, _ = pages.shape
        flat = pages.view(count, page * self.token_bytes)
        codes, scales = flat[:, : page * self.c], flat[:, page * self.c :]
        return codes.unflatten(1, (page, self.c)), scales.unflatten(1, (page, SCALE_BYTES))

    def rows(self, pages: torch.Tensor) -> torch.Tensor:
        """Return the rows [p, page, c + 4] of the tokens in pages of the same shape: a copy."""
        return torch.cat(self.parts(pages), dim=-1)

    def put(self, cache: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Write rows [s, c + 4] of tokens to slots [s] int64 of a cache [pages, page, c + 4] uint8."""
        page, place = slots // cache.shape[1], slots % cache.shape[1]
        for part, columns in zip(self.parts(cache), rows.split((self.c, SCALE_BYTES), dim=1), strict=True):
            part[page, place] = columns

    def write(self, cache: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor) -> None:
        """Write keys [s, c] to slots [s] int64 of a cache [pages, page, c + 4] uint8."""
        self.put(cache, slots, self.encode(keys))


INDEX_FORMATS = {"fp8": IndexFp8}


def stored_index_format(name: str | None, selects: object = True) -> str:
    """Return the format that specs name: "" for None and "plain", which are numbers of the layer's dtype.

    Raises `CacheFormatError` for a format where nothing `selects`, and so there are no keys to store.
    """
    stored = "" if not name or name == "plain" else name
    if stored and not selects:
        raise CacheFormatError("this config has no indexer, and so no index keys: leave index_format out.")
    return stored


def index_codec(name: str, d: int) -> IndexFp8 | None:
    """Return the codec of an index cache for keys of d channels; None for "", the plain cache.

    Raises `CacheFormatError` for an unknown name, or what is none.
    """
    if not name:
        return None
    if not isinstance(name, str) or name not in INDEX_FORMATS:
        raise CacheFormatError(
            f"unknown index format {name!r}.{did_you_mean(str(name), [*INDEX_FORMATS])} "
            f"Formats: plain, {', '.join(INDEX_FORMATS)}."
        )
    return INDEX_FORMATS[name](d)


def index_keys(pages: torch.Tensor, codec: IndexFp8 | None) -> torch.Tensor:
    """Return index keys [p, page, d] in float32 of pages of a cache, plain or of bytes.

    A key of bytes is its d e4m3 numbers times the float32 scale of its token.
    """
    if codec is None:
        return pages.float()
    codes, scales = codec.parts(pages)
    return _numbers(codes, E4M3) * _numbers(scales, torch.float32)
