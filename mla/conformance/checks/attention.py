"""Checks of `latent_attention` and `expanded_attention`: cases, by why kernels fail (`registry.KINDS`).

Where a key could be lost unseen, queries are aimed (`mla/cases/stress.py`) or weigh all keys alike. Every
check watches the memory before the first and behind the last row of outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from mla.cases.case import OpCase
from mla.cases.stress import EVEN, Stress
from mla.conformance.checks import op_cases, op_check
from mla.conformance.reach import far
from mla.conformance.trial import Refused, Trial
from mla_backends.api import AttentionSpec

Lengths = tuple[int, ...]
Lens = tuple[Lengths, Lengths]  # new tokens and keys, per request
Make = Callable[..., OpCase]  # of lengths, and what is not as usual

# Widths of heads and latents: what every model of the family has, and every kernel is made for; and others.
DEEPSEEK: dict[str, Any] = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "softmax_scale": 192**-0.5,
}
SMALL_SPEC: dict[str, Any] = {
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "softmax_scale": 24**-0.5,
}
SPEC = AttentionSpec(**DEEPSEEK, num_heads=16, dtype=torch.float32, device=torch.device("cpu"))


def attention(kind: str, query_lens: Lengths, kv_lens: Lengths, heads: int = 16, **changes: Any) -> OpCase:
    """Return a case of either op."""
    return OpCase(kind, SPEC, query_lens, kv_lens, stress=Stress()).but(num_heads=heads, **changes)


latent: Make = partial(attention, "latent_attention")
expanded: Make = partial(attention, "expanded_attention")
LATENT, EXPANDED = {"latent": latent}, {"expanded": expanded}
BOTH = LATENT | EXPANDED


def decode(*kv_lens: int, **changes: Any) -> OpCase:
    """Return a case of one new token per request."""
    return latent((1,) * len(kv_lens), kv_lens, **changes)


# A request of each kind: prefill, decode, several tokens with history, one across a page's end.
MIXED: Lens = ((5, 1, 9, 2), (5, 70, 64, 129))
# A segment without history, some with one, and a single query.
SEGMENTS: Lens = ((5, 1, 20, 3), (5, 70, 20, 67))


def usual(make: Make) -> Lens:
    """Return lengths of a batch of every kind of request."""
    return MIXED if make is latent else SEGMENTS


def around(*borders: int) -> Lengths:
    """Return each number, the one before it and the one after."""
    return tuple(border + beside for border in borders for beside in (-1, 0, 1))


# ------------------------------------------------------------------------------------------------- formula


@op_cases("decode", "formula", "a block table row, a length or a head taken from a neighbour", LATENT)
def decode_step(make: Make) -> Iterator[OpCase]:
    """One new token per request attends histories of different lengths."""
    yield from (decode(33, 7, 100, 64, 3), decode(90))


@op_cases("prefill", "formula", "a mask that leaks future tokens, which a long history hides", EXPANDED)
def prefill(make: Make) -> Iterator[OpCase]:
    """Requests without history see their own tokens up to each query."""
    yield make((5, 1, 40), (5, 1, 40))


# --------------------------------------------------------------------------------------------------- grid
# Lengths differ within a batch, as do those of neighbours, and hold no more keys than it takes.

# Requests of one new token, and of several: beyond 256 and 512 threads of a block, each of which plans one.
REQUESTS = (520, 300)
# Heads that models have, and requests of several new tokens.
REQUESTS_OF = (16, 300)
# Heads and requests of one new token: more rows than the 65535 blocks of a grid's second and third dimension.
BEYOND_GRID = (128, 513)
# Requests, new tokens of each and heads: more than 1024 tokens and 4096 rows (a head of a token each).
ROWS = (40, 33, 4)


def ragged(count: int, most: int) -> Lengths:
    """Return `count` lengths from 1 to `most`, none in order."""
    return tuple(1 + (7 * i + i // 3) % most for i in range(count))


def of_several(count: int, most: int) -> Lens:
    """Return lengths of queries, 1 to 3, and of keys: `most` more at most."""
    queries = ragged(count, 3)
    return queries, tuple(new + more - 1 for new, more in zip(queries, ragged(count, most), strict=True))


@op_cases("requests", "grid", "a table of a fixed number of requests, or a grid that ends early", LATENT)
def requests(make: Make) -> Iterator[OpCase]:
    """Hundreds of short requests are attended, each by its own row of the tables."""
    single, several = REQUESTS
    yield from (decode(*ragged(single, 9), heads=2), make(*of_several(several, 5), 2))
    heads, count = BEYOND_GRID
    yield decode(*ragged(count, 3), heads=heads, **SMALL_SPEC)  # or wider, for an op that serves no such
    heads, count = REQUESTS_OF
    yield make(*of_several(count, 5), heads)


@op_cases("segments", "grid", "a table of a fixed number of segments, or a grid that ends early", EXPANDED)
def segments(make: Make) -> Iterator[OpCase]:
    """Hundreds of short segments are attended, with and without a mask."""
    single, several = REQUESTS
    for count, causal in ((single, True), (several, True), (several, False)):
        yield make(*of_several(count, 5), 2, causal=causal)
    heads, count = REQUESTS_OF
    yield make(*of_several(count, 5), heads)


@op_cases("rows", "grid", "rows beyond the last of a grid, or a number of them that is too narrow", BOTH)
def rows(make: Make) -> Iterator[OpCase]:
    """Thousands of rows are attended, in one request and in many, the first of them without history."""
    count, tokens, heads = ROWS
    yield make((tokens,) * count, tuple(tokens + i % 9 for i in range(count)), heads)


# -------------------------------------------------------------------------------------------------- index
# Requests are short and their pages lie in a large cache, of which nothing else is ever touched.

PLACES = "places that are computed in 32 bits, and lie elsewhere in memory"


@op_check("far_pages", "index", PLACES, LATENT)
def far_pages(trial: Trial, make: Make) -> None:
    """Pages whose place in memory is beyond 32 bits are read where they are."""
    with far(trial, what="from the start") as numbers:
        for case in (decode(33, 130, 7), make(*MIXED)):
            pages = -(-numbers // (case.layout.page_size * sum(case.shape(case.entry.cached))))
            trial.check_cases([case.but(pages_before=pages)])


@op_check("far_rows", "index", PLACES, BOTH)
def far_rows(trial: Trial, make: Make) -> None:
    """Rows of queries, keys, values and outputs may lie apart, the last of them beyond 32 bits."""
    # Of q and out; of k and v as well, which are longer.
    with far(trial, tensors=2 if make is latent else 5, what="from first to last") as numbers:
        apart = numbers // 33 // 1024 * 1024  # so that the last of 35 rows is beyond, and all are aligned
        for causal in (True,) if make is latent else (True, False):
            case = make((4, 30, 1), (4, 31, 5), 2, causal=causal, apart=apart)
            trial.check_cases([case])


@op_cases("positions", "index", "positions kept in 15 or 16 bits", EXPANDED)
def positions(make: Make) -> Iterator[OpCase]:
    """Keys beyond 2^16 and queries beyond 2^15 are found."""
    yield make((2, 3, 40), (33_000, 33_000, 50), 1, aimed=True)


# -------------------------------------------------------------------------------------------------- tiles
# The borders of what kernels work in: pages, tiles of rows and keys, splits of a context.

# Sizes of tiles, pages and splits of keys, and what queries are cut into.
BORDERS = (16, 32, 64, 128, 256)
# Tiles that kernels cut a request's rows into: all heads of its first token, then of its second, and so on.
TILES = (16, 32, 64, 128, 256)
HEADS = (12, 20, 40, 48, 96)
# A key that starts a tile of keys, whatever size of tile up to 128 a kernel has.
FIRST_KEY = 128
# Head counts with every remainder of 32.
FEW_HEADS = (*range(1, 34), 40, 48, 57, 63, 96, 127, 128)
# Keys next to borders, and odd multiples of them, of one request each.
KEYS = (*around(*BORDERS, 512, 1024, 2048), 96, 160, 192, 320, 448, 576, 704, 1600)
# Heads that models have.
USUAL_HEADS = (16, 20, 24, 32, 40, 48, 64, 96, 128)
FEWER_TOKENS_FROM = 40  # heads, as many of them fill as many tiles
# Keys that leave every rest in a tile of up to 128, behind a whole one.
RESTS = tuple(range(129, 257))
FEW_TOKENS = tuple(range(1, 34))  # new tokens that leave every rest in a tile of up to 32
# New tokens and heads, of one request next to a short one.
MANY_HEADS = (257, 16)
# New tokens next to borders.
TOKENS = (17, 64, 129, 257, 300)
LONG_CONTEXT = 33_000  # keys: positions beyond 2^15


@op_cases("heads", "tiles", "a head count that is padded, cut or grouped without saying so", BOTH, exact=True)
def heads(make: Make) -> Iterator[OpCase]:
    """Any number of heads from 1 to 128 is served, or refused with a reason."""
    for count in FEW_HEADS:
        yield make((1, 1), (9, 3), count)
        more = (6, 7, 8, 9) if count < FEWER_TOKENS_FROM else ()
        yield make((2, 1, 3, 4, 5, *more), (2, 66, 3, 7, 5, *(16, 7, 9, 9)[: len(more)]), count)
        if make is expanded:
            yield make((2, 1, 5), (9, 3, 7), count, causal=False)
        if count in USUAL_HEADS:
            last = slice(3 if count < FEWER_TOKENS_FROM else 2)
            yield make((10, 17, 33)[last], (12, 17, 40)[last], count)


@op_cases(
    "cut_tokens",
    "tiles",
    "a last key lost where a tile of rows ends between the heads of a token",
    LATENT,
    exact=True,
)
def cut_tokens(make: Make) -> Iterator[OpCase]:
    """A token whose heads are in two tiles of rows sees its own key, which is the first in a tile of keys."""
    return (case for tile in TILES for count in HEADS for case in cut(tile, count))


def cut(tile: int, count: int) -> Iterator[OpCase]:
    """Yield the shortest request whose first tile of rows ends within a token, if it does."""
    token, within = divmod(tile, count)
    if within:
        yield latent((token + 1,), (FIRST_KEY + 1,), count, gain=EVEN)


@op_cases("keys", "tiles", "a last tile of keys that is dropped, or a split that loses one", LATENT)
def keys(make: Make) -> Iterator[OpCase]:
    """Lengths next to the borders of tiles and splits are attended in full, alone and together."""
    yield from (decode(*KEYS, heads=4, aimed=True), decode(*RESTS, heads=4, aimed=True))
    yield from (decode(length, heads=4, aimed=True) for length in (257, 513, 1025, 2047))
    yield decode(2500, *KEYS, heads=16, aimed=True)
    for count in (3, 16):
        yield latent((2, 3, 1, 5), (513, 130, 1025, 260), count, aimed=True)


@op_cases("new_tokens", "tiles", "a tile of new tokens whose mask or last row is wrong", BOTH)
def new_tokens(make: Make) -> Iterator[OpCase]:
    """Numbers of new tokens next to the borders of tiles are attended, without history and after one."""
    aimed = partial(make, aimed=True)
    for tokens in TOKENS:
        yield aimed((tokens, 1, tokens), (tokens, 5, tokens + 67), 2)
        if make is expanded:
            yield aimed((tokens, 1, tokens), (tokens + 67, 5, tokens), 2, causal=False)
    tokens, count = MANY_HEADS
    yield aimed((tokens, 17), (tokens + 67, 30), count)
    few = aimed(FEW_TOKENS, tuple(tokens + 3 for tokens in FEW_TOKENS), 3)
    yield from [few] if make is latent else [few.but(causal=False), few]


@op_cases(
    "long", "tiles", "partial results of a split context that are merged wrongly, or a narrow sum", EXPANDED
)
def long(make: Make) -> Iterator[OpCase]:
    """A context of thousands of tokens next to short ones is attended in full."""
    yield make((1, 2, 3), (2500, 9, 70), 4)
    for causal in (True, False):
        yield make((1, 5), (LONG_CONTEXT, 7), 2, aimed=True, causal=causal)
    yield make((1,), (8200,), 2, gain=EVEN)  # whose sums are long


# ------------------------------------------------------------------------------------------------ numbers

NO_LSE = "it does not supply the log-sum-exp (writes_lse is False)"


def require_lse(trial: Trial) -> None:
    """Refuse to judge a log-sum-exp that the op does not supply."""
    if not getattr(trial.op, "writes_lse", True):
        raise Refused(NO_LSE)
