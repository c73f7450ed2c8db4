"""Cases for our Triton kernels: an `OpCase` in poisoned memory, with a tile, splits and a plan of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from mla.cache.formats import Codec, codec_of
from mla.cases.case import Lengths, OpCase
from mla.cases.memory import Layout
from mla.cases.played import Laid, Scene
from mla.cases.stress import Stress
from mla_backends.api import AttentionSpec, BatchView, FusedOp, IndexerSpec, NormSpec
from mla_backends.triton_ops.attention import (
    ExpandedAttention,
    LatentAttention,
    LatentState,
    SparseLatentAttention,
    Splits,
)
from mla_backends.triton_ops.launcher import Launcher
from mla_backends.triton_ops.pointwise import RmsNorm, RotateQuery, WriteLatent
from mla_backends.triton_ops.selection import BITS, SelectLatents
from mla_backends.triton_ops.tuning import Tile, Tuning

SMALL = Tile(16, 16, 1, 1)
CPU = torch.device("cpu")
NO_PAGE = 10**9  # in entries of a table that no request owns: whoever follows them leaves the cache
EPS = 0.01  # large enough to be missed
# A cache beyond 2^31 numbers and 2^32 bytes. Nothing but the pages of a case is ever touched.
FAR_NUMBERS = 2_300_000_000
STRIDED = dict.fromkeys(
    ("q", "k", "v", "x", "kv_a", "cos_sin", "selection", "weights", "out", "lse"), (0, 16, 16)
)
POISONED = Layout(page_size=16, unowned=math.nan, gaps=STRIDED)


FORMATS = ("fp8", "fp8:0.3", "fp8_ds_mla", "fp8_ds_mla_any", "int8", "q8_0")


def by_format(name: str, latent: int, rope: int) -> Codec:
    """Return the codec of a format that is not plain."""
    codec = codec_of(name, latent, rope)
    assert codec is not None
    return codec


class Joined(RotateQuery):
    """The rotation of `WriteLatent`, beside latents of its own, which have the same angles."""

    def __call__(
        self, *, x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool, out: torch.Tensor
    ) -> None:
        tokens, width = x.shape[0], 16
        kv_a = torch.ones(tokens, width + x.shape[2], dtype=x.dtype)
        slots, cache = torch.arange(tokens), torch.empty(tokens, 1, kv_a.shape[1], dtype=x.dtype)
        WriteLatent(self.launcher)(
            kv_a=kv_a, weight=kv_a[0, :width], eps=EPS, cos_sin=cos_sin, interleaved=interleaved,
            slots=slots, cache=cache, x=x, out=out,
        )  # fmt: skip


class Split(LatentAttention):
    """The op with given splits, and parts that hold NaN until they are written."""

    splits: Splits | None = None

    def prepare(self, spec: AttentionSpec, batch: BatchView) -> LatentState:
        state: LatentState = super().prepare(spec, batch)
        splits = self.splits or state.splits
        parts = state.rows * splits.max_splits if splits.max_splits > 1 else 0
        memory = torch.full((parts * (spec.kv_lora_rank + 1),), torch.nan)
        return replace(state, splits=splits, parts=memory)


class SplitTokens(Split, SparseLatentAttention):
    """The same of the op whose tokens select their keys."""


@dataclass(frozen=True)
class KernelCase:
    """One call of one kernel."""

    case: OpCase
    tile: Tile = SMALL
    halves: bool = True  # latents as two products
    splits: Splits | None = None  # None: as the op chooses
    planned: Lengths | None = None  # the lengths when the state was prepared, if others
    with_lse: bool = True
    in_place: bool = False
    joined: bool = False  # with a write of latents
    native: bool = False  # the card converts e4m3
    by_torch: bool = False  # torch selects, as where our kernel fails its trial
    far: bool = False  # pages lie at the end of a cache beyond 32 bits

    def but(self, **changes: Any) -> KernelCase:
        """Return another case. A name is a field of this class, or one that `OpCase.but` takes."""
        outer = {name: changes.pop(name) for name in {field.name for field in fields(self)} & changes.keys()}
        return replace(self, **outer, case=self.case.but(**changes))

    def stored(self, name: str) -> KernelCase:
        """Return the case over a cache of this format."""
        spec = self.case.spec
        codec = by_format(name, spec.kv_lora_rank, spec.qk_rope_head_dim)
        return self.but(cache_format=name, token_bytes=codec.token_bytes)

    @property
    def op(self) -> FusedOp:
        """Return an op that has not been called."""
        tile = replace(self.tile, halves=self.halves)
        launcher, tuning = Launcher(native_e4m3=self.native), Tuning(latent={1: tile}, expanded={1: tile})
        if self.case.kind in ("latent_attention", "sparse_latent_attention"):
            op = (SplitTokens if self.case.spec.topk else Split)(launcher, tuning, 8)
            op.splits = self.splits
            return op
        if self.case.kind == "select_latents":
            select = SelectLatents(launcher)
            select._lack = "is not taken" * self.by_torch
            return select
        if self.case.kind == "expanded_attention":
            return ExpandedAttention(launcher, tuning)
        rotation = Joined if self.joined else RotateQuery
        kinds = {"rms_norm": RmsNorm, "rotate_query": rotation, "write_latent": WriteLatent}
        return kinds[self.case.kind](launcher)

    def wrong(self) -> list[str]:
        """Run the op. Return what is wrong with what it wrote, and where else it wrote."""
        call = later = self._placed(self.case.kv_lens)
        if self.planned:
            call = self._placed(self.planned)
            call.prepare()
            call.arguments["block_table"].copy_(later.arguments["block_table"])
        reason = call.call(later, call.leading) if self.planned else call.call()
        said = [reason] * bool(reason)
        truth = later.pool.truth.get("out")
        if self.case.kind == "rms_norm" and not _rounded_once(call.arguments["out"], truth):
            said.append("it is rounded more than once")
        return said

    def _placed(self, kv_lens: Lengths) -> Laid:
        """Return a call of these lengths. Its table ends where its memory does, and names no spare page."""
        case = self._in_memory(kv_lens)
        call = Laid(case, self.op, Scene((case,), lse=self.with_lse, in_place=self.in_place))
        if "block_table" in call.arguments:
            placed = call.arguments["block_table"]
            (count, columns), row = placed.shape, placed.shape[1] + 3
            memory = torch.full(((count - 1) * row + columns,), NO_PAGE, dtype=torch.int32)
            table = memory.as_strided((count, columns), (row, 1))
            call.replace(block_table=table)
            for entries, pages, keys in zip(table, placed, kv_lens, strict=True):
                owned = -(-keys // case.layout.page_size)
                entries[:owned] = pages[:owned]
        return call

    def _in_memory(self, kv_lens: Lengths) -> OpCase:
        """Return the case with these lengths. Planned and later ones have tables and caches of one shape."""
        size, case = self.case.layout.page_size, self.case
        owned = {
            lens: [-(-keys // size) for keys in lens] for lens in (case.kv_lens, self.planned or kv_lens)
        }
        columns = max(max(1, *pages) for pages in owned.values()) - max(1, *owned[kv_lens])
        spare = 2 + max(map(sum, owned.values())) - sum(owned[kv_lens])
        width = case.spec.kv_lora_rank + case.spec.qk_rope_head_dim if self.far else 1
        before = FAR_NUMBERS // (size * width) if self.far else 0
        return case.but(kv_lens=kv_lens, columns=columns, spare=spare, pages_before=before)


def _rounded_once(out: torch.Tensor, truth: torch.Tensor) -> bool:
    """Return whether numbers are those of float64, rounded: fp32 errors move few of them across a border."""
    return out.dtype == torch.float32 or bool((out != truth.to(out.dtype)).double().mean() < 0.01)


@dataclass(frozen=True)
class FarWrite:
    """`write_latent` to the last slots of a cache beyond 2^31 numbers, of which nothing else is touched."""

    case: OpCase

    def wrong(self) -> list[str]:
        """Run the op. Return what is wrong with the rows it wrote."""
        call, width = Laid(self.case, WriteLatent(Launcher())), sum(self.case.shape("c+r"))
        cache = torch.empty(FAR_NUMBERS // (64 * width), 64, width, dtype=self.case.spec.dtype)
        slots = cache.shape[0] * 64 - 1 - torch.arange(self.case.rows)
        call.replace(cache=cache, slots=slots)
        return list(filter(None, [call.call()]))


@dataclass(frozen=True, eq=False)
class BestCase:
    """The best of given scores: each token is a request of its own, which sees `seen` of its numbers."""

    scores: torch.Tensor  # [t, n] fp32
    seen: Lengths
    topk: int
    tile: int = 64

    def chosen(self) -> torch.Tensor:
        """Return what the kernel selects [t, topk], or 77 if it writes elsewhere. NaN is unseen."""
        from mla_backends.triton_ops.jit.selection import take_best

        (tokens, width), first = self.scores.shape, 1  # a token before them has had its turn
        held = torch.full((tokens, width + 3), torch.nan)
        for row, scores, count in zip(held, self.scores, self.seen, strict=True):
            row[:count] = scores[:count]
        out = torch.full((first + tokens, self.topk + 2), 77, dtype=torch.int32)
        take_best[(tokens,)](
            scores=held, kv_lens=torch.tensor((5, *self.seen)).int(), out=out, out_token=out.stride(0),
            cu_q=torch.arange(tokens + 2).int(), requests=tokens + 1, first=first, width=width + 3,
            topk=self.topk, TILE=self.tile, BITS=BITS, EARLY=False,
        )  # fmt: skip
        strange = (out[:first] != 77).any() or (out[:, self.topk :] != 77).any()
        return torch.full((tokens, self.topk), 77) if strange else out[first:, : self.topk]

    def wrong(self) -> list[str]:
        """Check each row against its scores in order: the same numbers, of places that ascend, then -1."""
        said = []
        for scores, chosen, count in zip(self.scores, self.chosen(), self.seen, strict=True):
            taken = chosen[: max(0, min(count, self.topk))].long()
            if (chosen[len(taken) :] != -1).any():
                said.append("something other than -1 is behind the last")
            if (taken.diff() <= 0).any() or ((taken < 0) | (taken >= max(1, count))).any():
                said.append("places do not ascend, or are not seen")
                continue
            wanted = scores[:count].sort(descending=True).values[: len(taken)]
            if not torch.equal(scores[taken].sort(descending=True).values, wanted):
                said.append("others are better")
        return said


def latent(
    query_lens: Lengths, kv_lens: Lengths, *, heads: int = 12, latent: int = 512, rope: int = 64,
    dtype: torch.dtype = torch.bfloat16, **changes: Any,
) -> KernelCase:  # fmt: skip
    """Return a case of `latent_attention`."""
    spec = AttentionSpec(heads, latent, 128, rope, 128, (latent + rope) ** -0.5, dtype, CPU)
    case = OpCase("latent_attention", spec, query_lens, kv_lens, stress=Stress(), layout=POISONED)
    return KernelCase(case).but(**changes)


def sparse(
    query_lens: Lengths, kv_lens: Lengths, topk: int, *, heads: int = 12, latent: int = 128,
    **changes: Any,
) -> KernelCase:  # fmt: skip
    """Return a case of `sparse_latent_attention`, of tokens that select at random."""
    spec = AttentionSpec(heads, latent, 128, 64, 128, latent**-0.5, torch.bfloat16, CPU, topk=topk)
    case = OpCase("sparse_latent_attention", spec, query_lens, kv_lens, stress=Stress(), layout=POISONED)
    return KernelCase(case).but(**changes)


def select(
    query_lens: Lengths, kv_lens: Lengths, topk: int, *, heads: int = 5, depth: int = 48, **changes: Any
) -> KernelCase:
    """Return a case of `select_latents`."""
    spec = IndexerSpec(heads, depth, depth // 2, topk, torch.bfloat16, CPU)
    case = OpCase("select_latents", spec, query_lens, kv_lens, stress=Stress(), layout=POISONED)
    return KernelCase(case).but(**changes)


def expanded(
    query_lens: Lengths, kv_lens: Lengths, *, heads: int = 3, widths: tuple[int, int, int] = (128, 64, 128),
    dtype: torch.dtype = torch.bfloat16, **changes: Any,
) -> KernelCase:  # fmt: skip
    """Return a case of `expanded_attention`: keys of nope + rope channels and values, `widths`."""
    nope, rope, values = widths
    spec = AttentionSpec(heads, 512, nope, rope, values, (nope + rope) ** -0.5, dtype, CPU)
    case = OpCase("expanded_attention", spec, query_lens, kv_lens, stress=Stress(), layout=POISONED)
    return KernelCase(case).but(**changes)


def norm(tokens: int, width: int, dtype: torch.dtype = torch.bfloat16) -> KernelCase:
    """Return a case of `rms_norm` of rows [tokens, width]."""
    return _small("rms_norm", NormSpec(width, dtype, CPU), tokens)


def rotation(
    tokens: int, heads: int, width: int = 64, *, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> KernelCase:
    """Return a case of `rotate_query` of [tokens, heads, width]."""
    spec = AttentionSpec(heads, 512, 128, width, 128, 1.0, dtype, CPU)
    return _small("rotate_query", spec, tokens).but(**changes)


def write(
    tokens: int, *, latent: int = 512, rope: int = 64, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> KernelCase:
    """Return a case of `write_latent` of [tokens, latent + rope] to slots in no order."""
    spec = AttentionSpec(1, latent, 128, rope, 128, 1.0, dtype, CPU)
    return _small("write_latent", spec, tokens).but(page_size=4, **changes)


def _small(kind: str, spec: NormSpec | AttentionSpec, tokens: int) -> KernelCase:
    lengths, stress = (tokens,), Stress(size=0.1)
    return KernelCase(OpCase(kind, spec, lengths, lengths, eps=EPS, stress=stress, layout=POISONED))
