"""Formats of the index cache: what the bytes of one page of index keys are.

They split pages: the values of all tokens come first, and then their scales. So a row of the flattened
cache is no token's, unless a page holds one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mla.cache.formats import (
    E4M3_MAX,
    LEAST_SCALE,
    Codec,
    Rows,
    _bytes,
    _e4m3,
    _e4m3_numbers,
    _largest,
    _over,
    _power_above,
)
from mla.errors import CacheFormatError, did_you_mean

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
        return torch.cat((_bytes(_e4m3(wide / scales)), _bytes(scales)), dim=1)

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
    codes, scales = (part.clone(memory_format=torch.contiguous_format) for part in codec.parts(pages))
    return _e4m3_numbers(codes) * scales.view(torch.float32)
