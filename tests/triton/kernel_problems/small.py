"""Problems of the small ops: strided operands amid NaN, slots in any order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from op_inputs import angles

from kernel_problems.memory import amid, differences, draw, output, poisoned
from mla.verify.op_oracle import true_norm, true_rotation
from mla_backends.triton_ops.launcher import Launcher
from mla_backends.triton_ops.pointwise import RmsNorm, RotateQuery, WriteLatent

EPS = 0.01  # large enough to be missed


@dataclass(frozen=True)
class NormProblem:
    """`rms_norm` of rows [tokens, width]."""

    tokens: int
    width: int
    dtype: torch.dtype = torch.bfloat16

    def wrong(self) -> list[str]:
        """Run the op. Return what is wrong with its output."""
        x = draw(self.tokens, self.width, dtype=self.dtype) * 0.1
        weight = draw(self.width, dtype=self.dtype, seed=1)
        out = output(self.tokens, self.width, dtype=self.dtype)
        RmsNorm(Launcher())(x=poisoned(x), weight=weight, eps=EPS, out=out.part)
        return differences(out, true_norm(x, weight, EPS))


@dataclass(frozen=True)
class RotationProblem:
    """`rotate_query` of [tokens, heads, width], perhaps in place."""

    tokens: int
    heads: int
    width: int = 64
    interleaved: bool = True
    in_place: bool = False
    dtype: torch.dtype = torch.bfloat16

    def wrong(self) -> list[str]:
        """Run the op. Return what is wrong with its output."""
        x = draw(self.tokens, self.heads, self.width, dtype=self.dtype)
        cos_sin = angles(self.tokens, self.width)
        out = output(*x.shape, dtype=self.dtype)
        source = poisoned(x)
        if self.in_place:
            source = out.part.copy_(x)
        RotateQuery(Launcher())(
            x=source, cos_sin=poisoned(cos_sin), interleaved=self.interleaved, out=out.part
        )
        return differences(out, true_rotation(x, cos_sin, self.interleaved))


@dataclass(frozen=True)
class WriteProblem:
    """`write_latent` of [tokens, latent + rope] to slots in no order."""

    tokens: int
    latent: int = 512
    rope: int = 64
    interleaved: bool = True
    dtype: torch.dtype = torch.bfloat16

    def wrong(self) -> list[str]:
        """Run the op. Return what is wrong with the cache: written rows, and all others."""
        width, page, pages = self.latent + self.rope, 4, 2 + self.tokens // 2
        kv_a = draw(self.tokens, width, dtype=self.dtype) * 0.1
        weight = draw(self.latent, dtype=self.dtype, seed=1)
        cos_sin = angles(self.tokens, self.rope)
        whole = amid(torch.full((pages * page * width,), torch.nan, dtype=self.dtype), 77.0)
        cache = whole.part.view(pages, page, width)
        slots = torch.randperm(pages * page, generator=torch.Generator().manual_seed(3))[: self.tokens]
        WriteLatent(Launcher())(
            kv_a=poisoned(kv_a),
            weight=weight,
            eps=EPS,
            cos_sin=poisoned(cos_sin),
            interleaved=self.interleaved,
            slots=slots,
            cache=cache,
        )
        rows = cache.view(-1, width)
        parts = (
            true_norm(kv_a[:, : self.latent], weight, EPS),
            true_rotation(kv_a[:, self.latent :], cos_sin, self.interleaved),
        )
        rest = rows.isnan().all(dim=1)
        rest[slots] = True
        said = ["a slot was written that nobody asked for"] * (not bool(rest.all()))
        said += ["memory around the cache was written"] * (not whole.intact())
        for part, columns in zip(parts, (slice(0, self.latent), slice(self.latent, None)), strict=True):
            if part.shape[1]:
                found = output(*part.shape, dtype=self.dtype)
                found.part.copy_(rows[slots, columns])
                said += differences(found, part)
        return said
