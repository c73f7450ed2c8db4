"""Cases for what kernels read and write of cache formats: bit for bit what their codecs do."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from kernel_cases import by_format

from mla.cache.formats import Codec
from mla_backends.triton_ops.launcher import Launcher, stored, wide

UNTOUCHED, MARK = 0xA5, 123.0
NAME_OF_NAN = 99.0  # in comparisons


def kernels() -> ModuleType:
    """Return the kernels, which start what is installed now: the real ones, or some with a mistake."""
    sys.modules.pop("format_kernels", None)
    return importlib.import_module("format_kernels")


@dataclass(frozen=True)
class E4M3Case:
    """Every code, and numbers at and around the middles between numbers."""

    native: bool = False

    def wrong(self) -> list[str]:
        """Return what is wrong, if anything."""
        codes, out = torch.arange(256).to(torch.uint8), torch.empty(256)
        kernels().decode[(1,)](codes, out, N=256, NATIVE=self.native)
        right = codes.view(torch.float8_e4m3fn).float()
        said = (
            [] if _same(out, right) and int(out.isnan().sum()) == 2 else ["codes are read as other numbers"]
        )
        x = between(codes[:127].view(torch.float8_e4m3fn).float())
        out = torch.empty(len(x), dtype=torch.uint8)
        kernels().encode[(1,)](x, out, N=len(x), NATIVE=self.native)
        same = torch.equal(out, x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
        return said if same else [*said, "numbers are rounded to other codes"]


def between(numbers: torch.Tensor) -> torch.Tensor:
    """Return sorted numbers, what lies halfway to the next, the float32 on both sides of it, and odd ones."""
    middles = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, middles, middles.nextafter(numbers[1:]), middles.nextafter(numbers[:-1])])
    x = torch.cat([x, torch.tensor([448.1, 464.0, 1e30, torch.inf, torch.nan, 1e-45])])
    return torch.cat([x, -x, torch.zeros(wide(2 * len(x)) - 2 * len(x))])


@dataclass(frozen=True)
class FormatCase:
    """Tokens of one format, with numbers of all sizes and any bytes."""

    name: str
    latent: int = 512
    rope: int = 64
    native: bool = False

    def wrong(self) -> list[str]:
        """Return what is wrong, if anything."""
        codec, widths = self.codec, (self.latent, self.rope)
        numbers = rows(codec)
        right = codec.encode(*numbers.split(widths, dim=1))
        said = [] if torch.equal(self.written(numbers), right) else ["bytes are not those of the codec"]
        drawn = torch.randint(256, (40, codec.token_bytes), generator=torch.Generator().manual_seed(2)).byte()
        decoded = [(cache, torch.cat(codec.decode(cache), dim=1)) for cache in (drawn, right)]
        same = all(_same(self.read(cache), numbers) for cache, numbers in decoded)
        return said if same else [*said, "bytes are read as other numbers"]

    @property
    def codec(self) -> Codec:
        return by_format(self.name, self.latent, self.rope)

    def written(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return what a kernel makes of numbers [T, c + r]."""
        cache = torch.full((len(numbers), self.codec.token_bytes), UNTOUCHED, dtype=torch.uint8)
        kernels().write_all[(len(numbers),)](numbers=numbers, cache=cache, **self._arguments(cache))
        return cache

    def read(self, cache: torch.Tensor) -> torch.Tensor:
        """Return the numbers that a kernel finds in bytes [T, token_bytes]."""
        numbers, arguments = torch.full((len(cache), self.latent + self.rope), MARK), self._arguments(cache)
        more = {"tokens": len(cache), "KEYS": wide(len(cache))}
        kernels().read_all[(1,)](cache=cache, numbers=numbers, **arguments, **more)
        return numbers * arguments["scale"] if arguments["FORMAT"] == "fp8" else numbers

    def _arguments(self, cache: torch.Tensor) -> dict[str, Any]:
        facts, scale = stored(cache[None], self.name, Launcher(native_e4m3=self.native))
        widths = {"LATENT": self.latent, "WIDE": wide(self.latent), "ROPE": self.rope}
        return {**facts, **widths, "WIDE_ROPE": wide(self.rope), "scale": scale}


def rows(codec: Codec) -> torch.Tensor:
    """Return latents and keys [T, c + r] of all sizes, with numbers that have no size in some."""
    draw = torch.Generator().manual_seed(1)
    width = codec.c + codec.r
    spread = torch.randn(12, width, generator=draw) * torch.logspace(-44, 37, 12)[:, None]
    usual = torch.randn(6, width, generator=draw) * torch.rand(6, width, generator=draw).exp2()
    by = torch.tensor([1, 2, 3, 32, 448, 2**13])
    ties = torch.randint(-896, 897, (6, width), generator=draw) / by[:, None]
    odd = torch.randn(6, width, generator=draw)
    odd[0], odd[1, ::3], odd[2, 5], odd[3, ::7] = 0.0, torch.nan, torch.inf, -torch.inf
    odd[4], odd[5] = 336.0, 448 * 2.0**-9
    odd[4, 1::2] = 1.0
    borders = torch.stack([torch.full((width,), 448 * 2.0**k) for k in (-13, -1, 0, 7)])
    borders[1:, ::5] = torch.nextafter(borders[1:, ::5], torch.tensor(torch.inf))
    halves = torch.arange(width).remainder(253).sub(126.5)[None].repeat(2, 1)  # of int8, over scales of 1
    halves[:, ::32] = 127.0
    numbers = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).float()
    middles = ((numbers[1:] + numbers[:-1]) / 2 * 0.3)[torch.randint(126, (4, width), generator=draw)]
    return torch.cat((spread, usual, ties, odd, borders, halves, middles)).float()


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.nan_to_num(nan=NAME_OF_NAN), y.nan_to_num(nan=NAME_OF_NAN))
