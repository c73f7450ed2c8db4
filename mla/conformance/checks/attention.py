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
SMALL: dict[str, Any] = {
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
def decode_step(make: Make, quick: bool) -> Iterator[OpCase]:
    """One new token per request attends histories of different lengths."""
    yield from (decode(33, 7, 100, 64, 3), decode(90))


@op_cases("multi_token", "formula", "a mask that is off by one when tokens follow a history", LATENT)
def multi_token(make: Make, quick: bool) -> Iterator[OpCase]:
    """Several new tokens per request, as in speculative decoding, are causal after their history."""
    for count in (2, 3) if quick else (2, 3, 4, 5, 8):
        yield make((count,) * 3, (70, count + 1, 64))


@op_cases("prefill", "formula", "a mask that leaks future tokens, which a long history hides", BOTH)
def prefill(make: Make, quick: bool) -> Iterator[OpCase]:
    """Requests without history see their own tokens up to each query."""
    lengths = (5, 1, 40) if quick else (5, 1, 40, 64, 65, 129, 300)
    yield make(lengths, lengths)


@op_cases("history", "formula", "causality aligned at the first key instead of the last", EXPANDED)
def history(make: Make, quick: bool) -> Iterator[OpCase]:
    """The last query of a segment sees the last key, whatever the history before it."""
    yield from (make((3, 9), (40, 64)), make((1, 2, 5), (65, 129, 6)))


@op_cases("mixed", "formula", "tokens of one request that land in, or attend, another", BOTH)
def mixed(make: Make, quick: bool) -> Iterator[OpCase]:
    """Prefill, decode and several tokens after a history share a batch."""
    yield make(*usual(make))
    if make is latent:
        yield make((1, 12, 1), (65, 40, 9))


@op_cases("unmasked", "formula", "a mask that is applied although the call is not causal", EXPANDED)
def unmasked(make: Make, quick: bool) -> Iterator[OpCase]:
    """Without a mask every query sees every key of its segment, even when there are fewer keys."""
    yield make((5, 1, 20), (3, 9, 20), causal=False)


# --------------------------------------------------------------------------------------------------- grid
# Lengths differ within a batch, as do those of neighbours, and hold no more keys than it takes.

# Requests of one new token, and of several. Beyond 256, 512 and 1024: threads of a block, of which each may
# plan a request. Beyond 4096: more than a planner may have memory for.
REQUESTS, MOST_REQUESTS = (520, 300), (4200, 1100)
# Heads that models have, and requests.
REQUESTS_OF = ((16, 300), (128, 140))
# Requests, new tokens of each and heads: more than 1024 tokens and 4096 rows (a head of a token each), ...
ROWS = ((40, 33, 4),)
# ... the same in one request, more than 4096 tokens, and more than 2^16 rows.
MOST_ROWS = (*ROWS, (1, 1100, 4), (2, 2100, 1), (5, 120, 112))


def ragged(count: int, most: int) -> Lengths:
    """Return `count` lengths from 1 to `most`, none in order."""
    return tuple(1 + (7 * i + i // 3) % most for i in range(count))


def of_several(count: int, most: int) -> Lens:
    """Return lengths of queries, 1 to 3, and of keys: `most` more at most."""
    queries = ragged(count, 3)
    return queries, tuple(new + more - 1 for new, more in zip(queries, ragged(count, most), strict=True))


@op_cases("requests", "grid", "a table of a fixed number of requests, or a grid that ends early", LATENT)
def requests(make: Make, quick: bool) -> Iterator[OpCase]:
    """Hundreds of short requests are attended, each by its own row of the tables."""
    single, several = REQUESTS if quick else MOST_REQUESTS
    yield from (decode(*ragged(single, 9), heads=2), make(*of_several(several, 5), 2))
    for heads, count in REQUESTS_OF[: 1 if quick else None]:
        yield make(*of_several(count, 5), heads)


@op_cases("segments", "grid", "a table of a fixed number of segments, or a grid that ends early", EXPANDED)
def segments(make: Make, quick: bool) -> Iterator[OpCase]:
    """Hundreds of short segments are attended, with and without a mask."""
    for count in REQUESTS if quick else MOST_REQUESTS:
        for causal in (True, False) if count == REQUESTS[-1] or not quick else (True,):
            yield make(*of_several(count, 5), 2, causal=causal)
    for heads, count in REQUESTS_OF[: 1 if quick else None]:
        yield make(*of_several(count, 5), heads)


@op_cases("rows", "grid", "rows beyond the last of a grid, or a number of them that is too narrow", BOTH)
def rows(make: Make, quick: bool) -> Iterator[OpCase]:
    """Thousands of rows are attended, in one request and in many, the first of them without history."""
    for count, tokens, heads in ROWS if quick else MOST_ROWS:
        yield make((tokens,) * count, tuple(tokens + i % 9 for i in range(count)), heads)


# -------------------------------------------------------------------------------------------------- index
# Requests are short and their pages lie in a large cache, of which nothing else is ever touched.

# Tokens per page, and pages of a cache that has more than 2^16 or 2^17 slots, or 2^16 pages.
CACHES = ((64, 2100), (16, 4400), (1, 70_000))
MORE_CACHES = (*CACHES, (64, 4400), (32, 4400), (128, 1100))
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


@op_cases("shared_pages", "index", "a page that is one request's alone, or looked up by its owner", LATENT)
def shared_pages(make: Make, quick: bool) -> Iterator[OpCase]:
    """Requests with a common beginning may share the pages that hold it."""
    for lengths in (((1, 1), (150, 70)), ((2, 1, 9), (66, 200, 140))):
        yield make(*lengths, 4, common=64, unowned=torch.nan)


@op_cases("slots", "index", "numbers of pages or slots that are kept in 8, 12, 15 or 16 bits", LATENT)
def slots(make: Make, quick: bool) -> Iterator[OpCase]:
    """Pages next to powers of two, and slots beyond 2^16, are read where they are."""
    for size, pages in CACHES if quick else MORE_CACHES:
        few = min(size, 8)
        for heads in (4, 16) if quick else (4, 16, 128):
            lengths = (1, few + 1, 1, 3), (few + 2, few + 1, 2, few + 3)
            yield make(*lengths, heads, page_size=size, pages=pages)


@op_cases("positions", "index", "positions, or entries of the block table, kept in 15 or 16 bits", BOTH)
def positions(make: Make, quick: bool) -> Iterator[OpCase]:
    """Keys beyond 2^16, queries beyond 2^15 and tables of more than 2^16 entries are found."""
    if make is expanded:
        yield make((2, 3, 40), (33_000, 33_000, 50), 1, aimed=True)
        return
    yield make((1,) * 99, (700, *range(1, 99)), 1, page_size=1)
    if not quick:
        yield decode(33_000, 7, heads=4, page_size=1, aimed=True)


# -------------------------------------------------------------------------------------------------- tiles
# The borders of what kernels work in: pages, tiles of rows and keys, splits of a context.

BOUNDARIES: Lengths = (1, 63, 64, 65, 127, 128, 129)
# Sizes of tiles, pages and splits of keys, and what queries are cut into.
BORDERS = (16, 32, 64, 128, 256)
# Tiles that kernels cut a request's rows into: all heads of its first token, then of its second, and so on.
TILES = (16, 32, 64, 128, 256)
HEADS = (12, 20, 40, 48, 96)
# A key that starts a tile of keys, whatever size of tile up to 128 a kernel has.
FIRST_KEY = 128
# Head counts with every remainder of 32, or all; more rows per request for those up to `SMALL_HEADS`.
FEW_HEADS = (*range(1, 34), 40, 48, 57, 63, 96, 127, 128)
ALL_HEADS, SMALL_HEADS = tuple(range(1, 129)), 48
# Keys next to borders, and odd multiples of them, of one request each.
KEYS = (*around(*BORDERS, 512, 1024, 2048), 96, 160, 192, 320, 448, 576, 704, 1600)
# Heads that models have, fewest first, and what each is tried with beside the numbers that few heads are.
MODELS = (16, 128)
USUAL_HEADS = (16, 20, 24, 32, 40, 48, 64, 96, 128)
# Keys that leave every rest in a tile of up to 128, behind a whole one.
RESTS = tuple(range(129, 257))
FEW_TOKENS = tuple(range(1, 34))  # new tokens that leave every rest in a tile of up to 32
# New tokens and heads, of one request next to a short one.
MANY_HEADS = ((257, 16), (200, 16), (129, 64), (150, 128))
# New tokens next to borders.
TOKENS = (*around(*BORDERS), 200, 300)
LONG, LONGEST = 33_000, 66_000  # keys: positions beyond 2^15 and 2^16


@op_cases("page_boundaries", "tiles", "a last page that is dropped, or read past the request's end", LATENT)
def page_boundaries(make: Make, quick: bool) -> Iterator[OpCase]:
    """Lengths just below, at and just above a page's end are attended in full."""
    yield decode(*BOUNDARIES)
    yield from (decode(length) for length in BOUNDARIES[1:6])


@op_cases("heads", "tiles", "a head count that is padded, cut or grouped without saying so", BOTH, exact=True)
def heads(make: Make, quick: bool) -> Iterator[OpCase]:
    """Any number of heads from 1 to 128 is served, or refused with a reason."""
    for count in FEW_HEADS if quick else ALL_HEADS:
        # Batches of 1, 2, 3 and more new tokens per request; each number alone as well.
        lengths: list[Lens] = [((1, 1), (9, 3)), ((2, 1, *range(3, 10)), (2, 66, 3, 7, 5, 16, 7, 9, 9))]
        if not quick and count <= SMALL_HEADS:
            lengths += [((2, 2), (3, 66)), ((3, 3), (70, 3)), ((4, 4), (4, 9)), ((7,), (20,))]
        yield from (make(*both, count) for both in lengths)
        if make is expanded:
            yield make((2, 1, 5), (9, 3, 7), count, causal=False)
        if count in USUAL_HEADS:
            yield make((10, 17, 33), (12, 17, 40), count)


@op_cases(
    "cut_tokens",
    "tiles",
    "a last key lost where a tile of rows ends between the heads of a token",
    LATENT,
    exact=True,
)
def cut_tokens(make: Make, quick: bool) -> Iterator[OpCase]:
    """A token whose heads are in two tiles of rows sees its own key, which is the first in a tile of keys."""
    tiles, counts = ((64, 128), (20, 48)) if quick else (TILES, HEADS)
    return (case for tile in tiles for count in counts for case in cut(tile, count))


def cut(tile: int, count: int) -> Iterator[OpCase]:
    """Yield the shortest request whose first tile of rows ends within a token, if it does."""
    token, within = divmod(tile, count)
    if within:
        yield latent((token + 1,), (FIRST_KEY + 1,), count, gain=EVEN)


@op_cases(
    "keys", "tiles", "a last tile of keys that is dropped, or a split that loses its first or last key", BOTH
)
def keys(make: Make, quick: bool) -> Iterator[OpCase]:
    """Lengths next to the borders of tiles and splits are attended in full, alone and together."""
    return _latent_keys(quick) if make is latent else _expanded_keys(quick)


def _latent_keys(quick: bool) -> Iterator[OpCase]:
    yield from (decode(*KEYS, heads=4, aimed=True), decode(*RESTS, heads=4, aimed=True))
    alone = (257, 513, 1025, 2047) if quick else KEYS
    yield from (decode(length, heads=4, aimed=True) for length in alone)
    for count in MODELS[: 1 if quick else None]:
        yield decode(2500, *KEYS, heads=count, aimed=True)
    for count in (3, 16):
        yield latent((2, 3, 1, 5), (513, 130, 1025, 260), count, aimed=True)


def _expanded_keys(quick: bool) -> Iterator[OpCase]:
    lengths = tuple(1 + i % 3 for i in range(len(KEYS)))
    models = zip(MODELS[: 1 if quick else None], (2500, 1025), strict=False)
    yield from (expanded(lengths, KEYS, 2, aimed=True, causal=causal) for causal in (True, False))
    yield expanded((2,) * len(RESTS), RESTS, 2, aimed=True)
    others: list[tuple[Lengths, Lengths, int]] = [((1,), (1025,), 3), ((130,), (700,), 3)]
    others += [((1, 3), (more, 321), count) for count, more in models]
    for other in others:
        yield from (expanded(*other, aimed=True, causal=causal) for causal in (True, False))


@op_cases("new_tokens", "tiles", "a tile of new tokens whose mask or last row is wrong", BOTH)
def new_tokens(make: Make, quick: bool) -> Iterator[OpCase]:
    """Numbers of new tokens next to the borders of tiles are attended, without history and after one."""
    aimed = partial(make, aimed=True)
    for tokens in (17, 64, 129, 257, 300) if quick else TOKENS:
        yield aimed((tokens, 1, tokens), (tokens, 5, tokens + 67), 2)
        if make is expanded:
            yield aimed((tokens, 1, tokens), (tokens + 67, 5, tokens), 2, causal=False)
    for tokens, count in MANY_HEADS[: 1 if quick else None]:
        yield aimed((tokens, 17), (tokens + 67, 30), count)
    few = aimed(FEW_TOKENS, tuple(tokens + 3 for tokens in FEW_TOKENS), 3)
    yield from [few] if make is latent else [few.but(causal=False), few]


@op_cases(
    "long", "tiles", "partial results of a split context that are merged wrongly, or a narrow sum", BOTH
)
def long(make: Make, quick: bool) -> Iterator[OpCase]:
    """A context of thousands of tokens next to short ones is attended in full."""
    if make is expanded:
        yield make((1, 2, 3), (2500, 9, 70), 4)
        for causal in (True, False):
            yield make((1, 5), (LONG, 7), 2, aimed=True, causal=causal)
        yield make((1,), (8200,), 2, gain=EVEN)  # whose sums are long
        if not quick:
            yield make((300, 2), (9000, 70), 2, aimed=True)
        return
    yield from (decode(2500, 1, 70, heads=8), decode(4097, 8193, heads=2, aimed=True))
    yield decode(LONG, 7, heads=4, aimed=True)
    if not quick:
        yield from (decode(8193, 1, 4096, 70, heads=8), decode(3, LONGEST, heads=4, aimed=True))
        yield from (decode(5, length, heads=4, aimed=True) for length in around(4096, 8192, 16_384))
        yield make((4,), (20_000,), 2, aimed=True)


# ---------------------------------------------------------------------------------------- order and emptiness

# Equal requests, and pairs of equal ones between others.
EQUAL: tuple[Lens, ...] = (
    ((1,) * 40, (70,) * 40),
    ((3,) * 6, (66,) * 6),
    ((1, 2, 1, 2, 1, 2), (9, 9, 9, 9, 65, 65)),
)
# New tokens and keys of requests that are handed over in several orders.
PAIRS = ((1, 3), (5, 5), (2, 70), (1, 64), (1, 130), (9, 20), (1, 3), (2, 65))


@op_cases("equal", "order", "requests of equal length that change places when they are sorted", BOTH)
def equal(make: Make, quick: bool) -> Iterator[OpCase]:
    """Requests of the same lengths keep their own rows."""
    return (make(*lengths, 4) for lengths in EQUAL)


@op_cases(
    "permuted", "order", "rows that come back sorted, or a plan kept for requests in another order", BOTH
)
def permuted(make: Make, quick: bool) -> Iterator[OpCase]:
    """The same requests in another order give the same rows in that order."""
    by_keys, by_new = sorted(PAIRS, key=lambda pair: pair[1]), sorted(PAIRS)
    for pairs in (PAIRS, by_keys, by_keys[::-1], by_new, by_new[::-1]):
        yield make(*(tuple(lengths) for lengths in zip(*pairs, strict=True)), 4)


@op_cases("zero_queries", "emptiness", "a request without new tokens that shifts those after it", LATENT)
def zero_queries(make: Make, quick: bool) -> Iterator[OpCase]:
    """Requests without new tokens take no row, wherever they are in the batch."""
    yield make((0, 2, 0, 1, 0), (5, 66, 0, 30, 64))
    yield from (make((0, 0, 3), (70, 0, 9)), make((1, 0, 0), (9, 9, 0)))
    yield make((1, 0, 0, 0, 1), (65, 64, 3, 0, 20))


@op_cases("empty_rows", "emptiness", "NaN in the rows a captured graph pads its batch with", LATENT)
def empty_rows(make: Make, quick: bool) -> Iterator[OpCase]:
    """A token without keys gets 0 and a log-sum-exp of -inf, at every place of a batch and alone."""
    for lengths in ((0, 40, 0, 65), (0, 0), (70, 3, 0), (0, 9), (1, 0, 0, 0, 64, 0), (0,)):
        yield decode(*lengths, unowned=torch.nan)


@op_cases("empty_segments", "emptiness", "an empty segment that shifts its neighbours or gives NaN", EXPANDED)
def empty_segments(make: Make, quick: bool) -> Iterator[OpCase]:
    """Segments may lack queries, or keys: then `out` is 0 and the log-sum-exp -inf."""
    for lengths in (((0, 4, 0, 3), (6, 9, 0, 3)), ((3, 0), (70, 5)), ((0, 0, 2), (3, 70, 2))):
        yield make(*lengths)
    for lengths in (((2, 3), (0, 5)), ((3, 2), (5, 0)), ((1, 3, 2), (9, 0, 66)), ((2, 1), (0, 0))):
        yield make(*lengths, causal=False)


@op_cases("no_tokens", "emptiness", "a grid of no blocks, which cannot be launched", BOTH)
def no_tokens(make: Make, quick: bool) -> Iterator[OpCase]:
    """A batch may have no new tokens at all."""
    yield from (make((0, 0), (5, 64)), make((0,), (70,)), make((0,), (0,)))


# ------------------------------------------------------------------------------------------------ numbers

NO_LSE = "it does not supply the log-sum-exp (writes_lse is False)"


def require_lse(trial: Trial) -> None:
    """Refuse to judge a log-sum-exp that the op does not supply."""
    if not getattr(trial.op, "writes_lse", True):
        raise Refused(NO_LSE)


@op_check("lse", "numbers", "a log-sum-exp to base 2, transposed, or without the scale", BOTH)
def lse(trial: Trial, make: Make) -> None:
    """The log-sum-exp is the natural logarithm, in fp32, laid out token by token."""
    require_lse(trial)
    more = [make(*of_several(300, 5), 2), *(make((2, 1, 3, 5), (2, 66, 3, 7), count) for count in (20, 127))]
    if make is latent:
        cases = [make(*MIXED), decode(33, 7, 100, heads=3), make((4, 4), (9, 66), 4)]
        cases += [decode(2500, 1, 70, heads=8), *more, make((129, 1), (196, 5), 2, aimed=True)]
    else:
        cases = [make(*SEGMENTS), make((4, 4), (9, 30), 4, causal=False)]
        cases += [make((1, 2, 3), (2500, 9, 70), 4), *more]
    trial.check_cases(cases, only=("lse",))


@op_cases(
    "large", "numbers", "logits that overflow: exp() without the maximum, or a narrow accumulator", BOTH
)
def large(make: Make, quick: bool) -> Iterator[OpCase]:
    """Logits in the thousands, of either sign, still give a finite output that is close to the truth."""
    cases = [decode(33, 130, 5, 1, 2), make((5, 9), (5, 70)), make((1, 1, 1), (1, 1, 1), 3)]
    if make is expanded:
        cases = [make(*SEGMENTS), make((1, 1, 1), (1, 1, 2), 3)]
    return (case.but(gain=1e3) for case in cases)
