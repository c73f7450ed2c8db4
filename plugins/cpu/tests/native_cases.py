"""Awkward memory layouts, attention problems over poisoned pages, and their truth in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from float64_attention import attend_segments

from mla.cache.formats import find_format
from mla.reference import REFERENCE
from mla.verify.tolerances import judge, row_errors
from mla_backend_cpu import compilation
from mla_backend_cpu.compilation import LEVELS, BuildError
from mla_backend_cpu.library import Library, loaded
from mla_backends.api import AttentionSpec, SegmentLengths

BF16, CPU = torch.bfloat16, torch.device("cpu")
#: Half a unit in the last place: what rounding to bf16 once may cost, relative to the value.
HALF = 2.0**-8
#: The same of fp32.
FINE = 2.0**-24

Lengths = Sequence[int]


def load(level: str) -> Library:
    """Return the kernels of a level. Raises `BuildError`."""
    kernels = loaded(level)
    if isinstance(kernels, str):
        raise BuildError(kernels)
    return kernels


def levels_here() -> list[str]:
    """Return the levels whose instructions this processor has; the last, portable, is always among them."""
    names = []
    for level in LEVELS:
        try:
            names.append(compilation.levels(level.name)[0].name)
        except BuildError:
            continue
    return names


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Return N(0, 1)."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of the bits, which compare equal where NaN is NaN."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).clone()


def any_bits(*shape: int, seed: int) -> torch.Tensor:
    """Return every kind of bf16: NaN payloads, infinities, denormals, minus zero."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**15), 2**15, shape, generator=generator).to(torch.int16).view(BF16)


def angles(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return cosines and then sines of random angles."""
    turn = 100 * draw(tokens, width // 2, seed=seed, dtype=torch.float32)
    return torch.cat((turn.cos(), turn.sin()), 1)


def assert_rounded(actual: torch.Tensor, truth: torch.Tensor, terms: torch.Tensor, count: int) -> None:
    """Assert that fp32 arithmetic on `count` terms, of sizes that add up to `terms`, was rounded once."""
    allowed = (
        {BF16: HALF, torch.float32: FINE}[actual.dtype] * truth.abs()
        + 1.01 * (count + 4) * FINE * terms
        + 1e-37
    )
    excess = ((actual.double() - truth).abs() / allowed).nan_to_num(nan=torch.inf)
    assert excess.max() <= 1, f"{int((excess > 1).sum())} of {excess.numel()} values are wrong"


# ---------------------------------------------------------------------------------------------- layouts

#: How a tensor may lie in memory: the shape of a wider one, and how the tensor is cut from it.
_LAY_OUT: Mapping[str, Callable[..., tuple[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]]]] = {
    "plain": lambda *shape: (shape, lambda base: base),
    "every_other": lambda *shape: ((*shape[:-1], 2 * shape[-1]), lambda base: base[..., ::2]),
    "columns": lambda *shape: ((*shape[:-1], shape[-1] + 5), lambda base: base[..., 3:-2]),
    "rows": lambda *shape: ((2 * shape[0], *shape[1:]), lambda base: base[1::2]),
    "swapped": lambda *shape: ((shape[1], shape[0], *shape[2:]), lambda base: base.transpose(0, 1)),
}
LAYOUTS = tuple(_LAY_OUT)


class Canvas:
    """A tensor laid out in one of `LAYOUTS`; `view` is the tensor, and what lies around it is NaN."""

    def __init__(self, shape: Sequence[int], layout: str, dtype: torch.dtype = BF16) -> None:
        wide, cut = _LAY_OUT[layout](*shape)
        self._base = torch.full(wide, torch.nan, dtype=dtype)
        self.view = cut(self._base)

    def holding(self, values: torch.Tensor) -> torch.Tensor:
        """Return the view, filled."""
        return self.view.copy_(values)

    def taken(self) -> torch.Tensor:
        """Return the values of the view. Raises AssertionError if anything around it was written."""
        values = self.view.clone()
        self.view.fill_(torch.nan)
        assert self._base.isnan().all(), "something was written beside the output"
        return values


def laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the same values in another layout."""
    return Canvas(values.shape, layout, values.dtype).holding(values)


# ---------------------------------------------------------------------------------------------- attention


def spec(heads: int, latent: int = 64, rotary: int = 32, nope: int = 32, value: int = 32) -> AttentionSpec:
    """Return a small spec with the usual softmax scale."""
    scale = (nope + rotary) ** -0.5
    return AttentionSpec(heads, latent, nope, rotary, value, scale, BF16, CPU)


@dataclass(frozen=True)
class LatentCase:
    """Arguments of `latent_attention`. NaN: pages nobody owns, and the slots past a request's end."""

    spec: AttentionSpec
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    q: torch.Tensor
    cache: torch.Tensor
    table: torch.Tensor
    owned: tuple[torch.Tensor, ...]  # per request its latents [s, c + r]

    def view(self) -> SimpleNamespace:
        """Return what `prepare` takes."""
        starts = [sum(self.query_lens[:i]) for i in range(len(self.query_lens) + 1)]
        return SimpleNamespace(
            query_lens=self.query_lens,
            kv_lens=self.kv_lens,
            page_size=self.cache.shape[1],
            block_table=self.table,
            kv_lens_device=torch.tensor(self.kv_lens, dtype=torch.int32),
            cu_q=torch.tensor(starts, dtype=torch.int32),
        )

    def run(
        self, op: Any, q_layout: str = "plain", out_layout: str = "plain"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out and lse, which held NaN before the call."""
        view = self.view()
        out = Canvas((*self.q.shape[:2], self.spec.kv_lora_rank), out_layout)
        lse = Canvas(self.q.shape[:2], "plain" if out_layout == "plain" else "columns", torch.float32)
        op(
            op.prepare(self.spec, view),
            q=laid_out(self.q, q_layout),
            cache=self.cache,
            block_table=self.table,
            kv_lens=view.kv_lens_device,
            cu_q=view.cu_q,
            softmax_scale=self.spec.softmax_scale,
            out=out.view,
            lse=lse.view,
            **({"cache_format": self.spec.cache_format} if self.spec.cache_format else {}),
        )
        return out.taken(), lse.taken()

    def stored(self, cache_format: str) -> LatentCase:
        """Return the same problem over a cache in a format: the bytes of all rows, NaN included."""
        latent, rotary = self.spec.kv_lora_rank, self.spec.qk_rope_head_dim
        codec = find_format(cache_format).codec(latent, rotary)
        rows = self.cache.view(-1, latent + rotary)
        cache = codec.encode(*rows.split((latent, rotary), dim=1))
        cache[rows.isnan().any(1)] = 0xFF  # NaN as a code and as a scale
        decoded = [codec.decode(codec.encode(*kv.split((latent, rotary), dim=1))) for kv in self.owned]
        return replace(
            self,
            spec=replace(self.spec, cache_format=cache_format, token_bytes=codec.token_bytes),
            cache=cache.view(*self.cache.shape[:2], -1),
            owned=tuple(torch.cat(parts, dim=1) for parts in decoded),
        )

    def truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out and lse in float64."""
        latent = self.spec.kv_lora_rank
        pieces = zip(self.q.split(list(self.query_lens)), self.owned, strict=True)
        shared = ((q, rows, rows[:, :latent]) for q, rows in pieces)
        return attend_segments(shared, self.spec.softmax_scale)


def latent_case(
    query_lens: Lengths,
    kv_lens: Lengths,
    heads: int = 3,
    *,
    page_size: int = 16,
    latent: int = 64,
    rotary: int = 32,
    scale: float | None = None,
    seed: int = 0,
) -> LatentCase:
    """Return a problem over shuffled pages; unused columns of the table name a page of NaN."""
    width, generator = latent + rotary, torch.Generator().manual_seed(seed)
    columns = max(1, -(-max(kv_lens) // page_size)) + 1
    pages = torch.randperm(len(kv_lens) * columns + 1, generator=generator).int()
    table = pages[1:].view(len(kv_lens), columns).clone()
    cache = torch.full((len(pages), page_size, width), torch.nan, dtype=BF16)
    owned = tuple(torch.randn(s, width, generator=generator).to(BF16) for s in kv_lens)
    for row, latents in zip(table, owned, strict=True):
        position = torch.arange(len(latents))
        cache[row[position // page_size].long(), position % page_size] = latents
        row[-(-len(latents) // page_size) :] = pages[0]
    q = torch.randn(sum(query_lens), heads, width, generator=generator).to(BF16)
    plain = spec(heads, latent, rotary)
    chosen = plain if scale is None else replace(plain, softmax_scale=scale)
    return LatentCase(chosen, tuple(query_lens), tuple(kv_lens), q, cache, table, owned)


@dataclass(frozen=True)
class ExpandedCase:
    """Arguments of `expanded_attention`."""

    spec: AttentionSpec
    lengths: SegmentLengths
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def run(self, op: Any, layout: str = "plain") -> tuple[torch.Tensor, torch.Tensor]:
        """Return out and lse, which held NaN before the call; all tensors lie in `layout`."""
        out = Canvas((*self.q.shape[:2], self.v.shape[2]), layout)
        lse = Canvas(self.q.shape[:2], "plain" if layout == "plain" else "columns", torch.float32)
        q, k, v = (laid_out(tensor, layout) for tensor in (self.q, self.k, self.v))
        state = op.prepare(self.spec, self.lengths)
        op(state, q=q, k=k, v=v, softmax_scale=self.spec.softmax_scale, out=out.view, lse=lse.view)
        return out.taken(), lse.taken()

    def truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out and lse in float64."""
        queries, keys = list(self.lengths.query_lens), list(self.lengths.kv_lens)
        pieces = zip(self.q.split(queries), self.k.split(keys), self.v.split(keys), strict=True)
        return attend_segments(pieces, self.spec.softmax_scale, self.lengths.causal)


def expanded_case(
    query_lens: Lengths,
    kv_lens: Lengths,
    heads: int = 3,
    *,
    causal: bool = True,
    nope: int = 32,
    rotary: int = 32,
    value: int = 32,
    seed: int = 0,
) -> ExpandedCase:
    """Return a problem of ragged segments."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((sum(query_lens), nope + rotary), (sum(kv_lens), nope + rotary), (sum(kv_lens), value))
    q, k, v = (torch.randn(t, heads, d, generator=generator).to(BF16) for t, d in shapes)
    lengths = SegmentLengths(tuple(query_lens), tuple(kv_lens), causal)
    return ExpandedCase(spec(heads, 64, rotary, nope, value), lengths, q, k, v)


def check_attention(case: Any, op: Any, *layouts: str) -> None:
    """Hold an op to the project's bounds (`mla.verify.tolerances`), per token and head.

    Few columns average the rounding of the weights less: 1.19 was measured with 32 and 64, and 0.93 above.
    """
    assert op.unsupported_reasons(case.spec) == []
    (out, lse), (true_out, true_lse) = case.run(op, *layouts), case.truth()
    reference = case.run(_reference(op.contract))[0]
    ratio, reason = judge(out, true_out, row_errors(reference, true_out), BF16)
    assert ratio <= (1 if out.shape[-1] >= 128 else 1.5), reason
    # Weights are rounded only where they meet values: what lse is made of stays fp32.
    torch.testing.assert_close(lse.double(), true_lse, atol=2e-5, rtol=2e-6)


@functools.cache
def _reference(contract: str) -> Any:
    return REFERENCE[contract.partition("/")[0]]
