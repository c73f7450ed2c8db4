"""Formats of the index cache: what the bytes of one page of index keys are.

They split pages: the values of all tokens come first, and then their scales. So a row of the flattened
cache is no token's, unless a page holds one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla.cache.formats import E4M3, E4M3_MAX
from mla.errors import CacheFormatError, did_you_mean

LEAST = 1e-4  # amax below it is taken for it
SCALE_BYTES = 4


@dataclass(frozen=True)
class IndexFp8:
    """e4m3 of a key's d channels over a power of two, 2^ceil(log2(max(amax, 1e-4) / 448)), in float32.

    As DeepSeek-V3.2 (`act_quant`), vLLM 0.33 and DeepGEMM store it. A stored number is at most `relative` of
    its own size and `least` of the scale from the number that was encoded.
    """

    d: int
    relative = 2.0**-4
    least = 2.0**-10

    @property
    def token_bytes(self) -> int:
        """The bytes of a token, wherever in its page they are."""
        return self.d + SCALE_BYTES

    def encode(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes [s, d] and scales [s, 4], both uint8, of keys [s, d] of any floating dtype."""
        wide = keys.float()
        amax = (
            wide.abs().nan_to_num(nan=0.0).amax(-1, keepdim=True) if self.d else wide.new_zeros(len(wide), 1)
        )
        ratio = amax.clamp(LEAST, torch.finfo(torch.float32).max) / wide.new_full((), E4M3_MAX)
        scales = ((ratio.view(torch.int32) + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)
        codes = (wide / scales).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
        return codes.view(torch.uint8), scales.view(torch.uint8)

    def parts(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of pages [p, page, d + 4] uint8: codes [p, page, d], scales [p, page, 4]."""
        count, page, _ = pages.shape
        flat = pages.view(count, page * self.token_bytes)
        codes, scales = flat[:, : page * self.d], flat[:, page * self.d :]
        return codes.unflatten(1, (page, self.d)), scales.unflatten(1, (page, SCALE_BYTES))

    def write(self, cache: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor) -> None:
        """Write keys [s, d] to slots [s] int64 of a cache [pages, page, d + 4] uint8."""
        page, place = slots // cache.shape[1], slots % cache.shape[1]
        for part, rows in zip(self.parts(cache), self.encode(keys), strict=True):
            part[page, place] = rows

    def decode(self, pages: torch.Tensor) -> torch.Tensor:
        """Return keys [p, page, d] float32 of pages [p, page, d + 4] uint8."""
        codes, scales = (part.clone(memory_format=torch.contiguous_format) for part in self.parts(pages))
        return codes.view(E4M3).float() * scales.view(torch.float32)


INDEX_FORMATS = {"fp8": IndexFp8}


def index_codec(name: str, d: int) -> IndexFp8 | None:
    """Return the codec of an index cache for keys of d channels; None for "", the plain cache.

    Raises `CacheFormatError` for an unknown name.
    """
    if not name:
        return None
    if name not in INDEX_FORMATS:
        raise CacheFormatError(
            f"unknown index format '{name}'.{did_you_mean(name, [*INDEX_FORMATS])} "
            f"Formats: {', '.join(INDEX_FORMATS)}."
        )
    return INDEX_FORMATS[name](d)


def index_keys(pages: torch.Tensor, codec: IndexFp8 | None) -> torch.Tensor:
    """Return index keys [p, page, d] in float32 of pages of a cache, plain or of bytes."""
    return pages.float() if codec is None else codec.decode(pages)
