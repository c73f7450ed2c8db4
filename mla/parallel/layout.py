"""`Layout`: what is split over ranks, and which part each has; `Share`: which tokens it has. No torch.

Also what a layout costs each rank: FLOPs and bytes of a forward, and collectives on a link.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from mla.config import MLAConfig
from mla.cost import KV_B, PROJECTIONS, Work, latent_attention_flops, parameters, step_work
from mla.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    import torch

Count = TypeVar("Count", int, "torch.Tensor")
AXES = ("dp", "tp", "dcp")
MAX_SIZE = 4096  # larger sizes are typos


@dataclass(frozen=True)
class Place:
    """One rank's coordinates."""

    dp: int
    tp: int
    dcp: int


@dataclass(frozen=True)
class Layout:
    """How many ways each thing is split; `world` ranks in all.

    `tp` splits heads: each rank has the weights of its own, and the whole latent cache.
    `dcp` splits the tokens of every request, interleaved, and the weights of heads as well: queries are
    gathered, each rank attends its tokens for the heads of all, and partial results are merged. `dp` splits
    requests, with all weights on every one of its parts.

    Ranks of one `dcp` group are neighbours, since they talk most; those of one `dp` part lie together.
    """

    tp: int = 1
    dp: int = 1
    dcp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if not 1 <= getattr(self, axis) <= MAX_SIZE:
                raise UsageError(f"{axis} must be between 1 and {MAX_SIZE}, got {getattr(self, axis)}.")

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read "tp=2,dcp=2". Raises `UsageError`."""
        sizes: dict[str, int] = {}
        for word in text.split(","):
            match = re.fullmatch(r"\s*([a-z]+)=([0-9]{1,6})\s*", word)
            if match is None or match[1] in sizes or match[1] not in AXES:
                raise UsageError(f"a layout has tp, dcp and dp at most once, as 'tp=2,dcp=2', got '{text}'.")
            sizes[match[1]] = int(match[2])
        return cls(**sizes)

    def __str__(self) -> str:
        named = [f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        return ",".join(named) or "tp=1"

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.dp * self.tp * self.dcp

    @property
    def head_parts(self) -> int:
        """Number of parts that the weights of heads are split into."""
        return self.tp * self.dcp

    def place(self, rank: int) -> Place:
        """Return where a rank is."""
        return Place(rank // self.head_parts, rank % self.head_parts // self.dcp, rank % self.dcp)

    def head_part(self, rank: int) -> int:
        """Return which part of the heads' weights a rank has."""
        return rank % self.head_parts

    def groups(self, size: int) -> list[list[int]]:
        """Return all ranks in groups of `size`: `head_parts` have all heads, `dcp` all of a request."""
        return [list(range(first, first + size)) for first in range(0, self.world, size)]

    def check(self, config: MLAConfig) -> None:
        """Raise `UsageError` unless the heads of `config`, and its contexts, can be split this way."""
        if config.index_topk and self.dcp > 1:
            raise UsageError(
                "a layer with an indexer needs whole contexts to select from: leave out dcp of --parallel."
            )
        if config.num_attention_heads % self.head_parts:
            raise UsageError(
                f"layout '{self}' splits heads over {self.head_parts} ranks, and config '{config.name}' has "
                f"{config.num_attention_heads}: choose a layout whose tp x dcp divides them."
            )


@dataclass(frozen=True)
class Share:
    """The tokens i of every request with i mod world == rank."""

    rank: int
    world: int

    def owns(self, position: Any) -> Any:
        """Return whether the token at a position is on this rank; of positions [T], for each."""
        return position % self.world == self.rank

    def held(self, length: Count) -> Count:
        """Return how many of the first `length` tokens this rank has; of lengths [T], for each."""
        return (length + self.world - 1 - self.rank) // self.world

    def first(self, length: int) -> int:
        """Return how many of the first `length` tokens are on rank 0: the most that any rank has."""
        return -(-length // self.world)


# ---------------------------------------------------------------------------------------------- costs
def rank_work(
    config: MLAConfig,
    layout: Layout,
    rank: int,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    itemsize: int,
    attention: str = "auto",
    token_bytes: int = 0,
) -> Work:
    """Return what a rank must do in a forward of the layer `config`, counted as in `mla.cost`.

    `query_lens` and `kv_lens` are whole lengths of the requests of its `dp` part. Collectives move no bytes
    here. With `dcp`, of which every request is absorbed, `attention` does not count.
    """
    part = config.with_heads(config.num_attention_heads // layout.head_parts)
    if layout.dcp > 1:
        place, cached = layout.place(rank).dcp, token_bytes or part.latent_dim * itemsize
        return _of_context(part, layout.dcp, place, query_lens, kv_lens, itemsize, cached)
    return step_work(part, query_lens, kv_lens, itemsize, attention, token_bytes)


def _of_context(
    part: MLAConfig,
    world: int,
    place: int,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    itemsize: int,
    cached: int,  # bytes of a token
) -> Work:
    """Return the work on every `world`-th token, from `place` on, for the heads of all ranks of `dcp`."""
    share, tokens, keys, new, pairs = Share(place, world), sum(query_lens), 0, 0, 0
    for query_len, kv_len in zip(query_lens, kv_lens, strict=True):
        keys += share.held(kv_len)
        new += share.held(kv_len) - share.held(kv_len - query_len)
        pairs += _pairs(query_len, kv_len, world, place)
    heads, c, r = (
        world * part.num_attention_heads,
        part.kv_lora_rank,
        part.qk_rope_head_dim,
    )
    per_token = parameters(part, (*PROJECTIONS, *KV_B))
    flops = 2 * tokens * per_token + latent_attention_flops(heads, pairs, c, r)
    moved = parameters(part) + 2 * tokens * part.hidden_size
    return Work(flops, itemsize * moved + (keys + new) * cached)


def _pairs(query_len: int, kv_len: int, world: int, place: int) -> int:
    """Return the pairs of new tokens and keys that are held: the sum of `Share.held` over what they see."""

    def seen(tokens: int) -> int:  # by the first of them: the sum of x // world for x up to `last`
        last = tokens + world - 1 - place
        whole = (last + 1) // world
        return world * whole * (whole - 1) // 2 + whole * (last + 1 - whole * world)

    return seen(kv_len) - seen(kv_len - query_len)


# ------------------------------------------------------------------------------------------------------ links
# What a collective costs on a link, by a latency (alpha) and a bandwidth (beta) for each kind.
#
# A rank of n sends its part of a tensor in so many steps, one message in each, as in R. Thakur, R.
# Rabenseifner and W. Gropp, *Optimization of Collective Communication Operations in MPICH* (2005),
# for long messages:
#
# - all-reduce, a ring: 2 (n - 1) steps and 2 (n - 1) / n of the tensor (its reduce-scatter and all-gather)
# - all-gather, a ring: n - 1 steps, and in each the tensor that one rank has
# - all-to-all, pairwise: n - 1 steps and (n - 1) / n of the tensor
#
# A collective takes steps * alpha + bytes sent / beta. Libraries choose other algorithms for small tensors.


ALL_REDUCE, ALL_GATHER, ALL_TO_ALL = KINDS = ("all-reduce", "all-gather", "all-to-all")

IDEAL = "ideal"  # collectives that take no time
_TIMES = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_PREFIXES = {"k": 1, "m": 2, "g": 3, "t": 4}
_NUMBER = r"([0-9.]+(?:e[-+]?[0-9]+)?|inf)"
_LINE = re.compile(
    rf"\s*alpha={_NUMBER}\s*(ns|us|ms|s)\s*,\s*beta={_NUMBER}\s*([kmgt])(i?)b/s\s*", re.IGNORECASE
)
_SYNTAX = "a link is written as in 'alpha=5us,beta=300GB/s'"


@dataclass(frozen=True)
class Call:
    """One collective of a forward among `ranks`.

    `nbytes` are those of the tensor that every rank has and gets in an all-reduce, of the one that each gives
    to an all-gather, and of all the equal parts that each has for others in an all-to-all.
    """

    kind: str
    ranks: int
    nbytes: int

    @property
    def sent(self) -> int:
        """Bytes that each rank sends."""
        if self.kind == ALL_GATHER:
            return self.nbytes * (self.ranks - 1)
        return self.nbytes * (self.ranks - 1) * (2 if self.kind == ALL_REDUCE else 1) // self.ranks

    @property
    def steps(self) -> int:
        """Messages that a rank sends, one after the other."""
        return (self.ranks - 1) * (2 if self.kind == ALL_REDUCE else 1)


@dataclass(frozen=True)
class Line:
    """Seconds of a message without bytes, and bytes per second; infinitely many cost nothing."""

    alpha: float = 0.0
    beta: float = math.inf

    def seconds(self, call: Call) -> float:
        """Return what a collective takes."""
        return call.steps * self.alpha + call.sent / self.beta

    def __str__(self) -> str:
        return f"alpha={1e6 * self.alpha:.6g}us,beta={self.beta / 1e9:.6g}GB/s"


@dataclass(frozen=True)
class Link:
    """A line for each kind of collective. Without any, collectives take no time."""

    lines: Mapping[str, Line]

    @classmethod
    def parse(cls, text: str) -> Link:
        """Read "alpha=5us,beta=300GB/s", the same by kind ("all-reduce:...;all-gather:..."), or "ideal".

        Raises `UsageError`.
        """
        if text.strip() == IDEAL:
            return cls({})
        lines: dict[str, Line] = {}
        for part in text.split(";"):
            kind, colon, numbers = part.strip().rpartition(":")
            if colon and kind not in KINDS:
                raise UsageError(f"link '{text}': unknown collective '{kind}'.{did_you_mean(kind, KINDS)}")
            line = _line(numbers, text)
            lines |= {kind: line} if colon else dict.fromkeys(KINDS, line)
        return cls(lines)

    def __str__(self) -> str:
        if not self.lines:
            return IDEAL
        lines = set(self.lines.values())
        if len(lines) == 1 and len(self.lines) == len(KINDS):
            return str(lines.pop())
        return ";".join(f"{kind}:{line}" for kind, line in self.lines.items())

    def missing(self, kinds: Sequence[str]) -> list[str]:
        """Return which of these kinds the link has no line for; an ideal link lacks none."""
        return [kind for kind in kinds if self.lines and kind not in self.lines]

    def seconds(self, calls: Sequence[Call]) -> float:
        """Return what collectives take one after the other. Raises KeyError for a kind without a line."""
        return sum((self.lines[call.kind].seconds(call) for call in calls if self.lines), 0.0)


def fit(small: tuple[Call, float], large: tuple[Call, float]) -> Line:
    """Return the line through the seconds of two collectives of one kind among as many ranks.

    Where noise would make the latency or the time per byte negative, that is 0.
    """
    (less, early), (more, late) = small, large
    per_byte = max(0.0, (late - early) / (more.sent - less.sent))
    alpha = max(0.0, (early - less.sent * per_byte) / less.steps)
    return Line(alpha, 1 / per_byte if per_byte else math.inf)


def _line(text: str, whole: str) -> Line:
    match = _LINE.fullmatch(text)
    try:
        alpha, beta = (float(match[1]), float(match[3])) if match else (math.nan, math.nan)
    except ValueError:  # as in 1.2.3
        alpha = beta = math.nan
    if match is None or not (alpha < math.inf and beta > 0):
        raise UsageError(f"{_SYNTAX}, got '{whole}'.")
    unit = (1024 if match[5] else 1000) ** _PREFIXES[match[4].lower()]
    return Line(alpha * _TIMES[match[2].lower()], beta * unit)
