"""Attention at the borders of what kernels work in: pages, tiles of rows and keys, splits of a context.

Where a key could be lost unseen, queries are aimed (`problems/attention.py`) or weigh all keys alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mla.conformance.checks.attention.common import (
    BORDERS,
    MIXED,
    around,
    decode,
    expanded,
    expanded_check,
    latent,
    latent_check,
)
from mla.conformance.problems.attention import EVEN, AttentionProblem, Lengths
from mla.conformance.problems.attention_call import check_out
from mla.conformance.trial import Trial

KIND = "tiles"
BOUNDARIES: Lengths = (1, 63, 64, 65, 127, 128, 129)
# Tiles that kernels cut a request's rows into: all heads of its first token, then of its second, and so on.
ROWS = (16, 32, 64, 128, 256)
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


@latent_check("page_boundaries", "a last page that is dropped, or read past the request's end", KIND)
def page_boundaries(trial: Trial) -> None:
    """Lengths just below, at and just above a page's end are attended in full."""
    check_out(trial, decode(*BOUNDARIES), *(decode(length) for length in BOUNDARIES[1:6]))


@latent_check("page_sizes", "an op that assumes pages of 64 tokens without saying so", KIND)
def page_sizes(trial: Trial) -> None:
    """Pages of any size are served, or refused with a reason."""
    for size in (1, 16, 128) if trial.quick else (1, 2, 4, 8, 16, 32, 128, 256):
        check_out(trial, decode(33, 7, 130, page_size=size), latent(*MIXED, page_size=size))


@latent_check("heads", "a head count that is padded, cut or grouped without saying so", KIND)
def heads(trial: Trial) -> None:
    """Any number of heads from 1 to 128 is served, or refused with a reason."""
    check_heads(trial, True)


def check_heads(trial: Trial, absorbed: bool) -> None:
    """Compare outputs of every number of heads with the truth; of usual ones with more new tokens as well."""
    for count in FEW_HEADS if trial.quick else ALL_HEADS:
        problems = [*_rows_of(absorbed, count, trial.quick or count > SMALL_HEADS)]
        if not absorbed:
            problems.append(AttentionProblem(False, (2, 1, 5), (9, 3, 7), heads=count, causal=False))
        if count in USUAL_HEADS:
            problems.append(AttentionProblem(absorbed, (10, 17, 33), (12, 17, 40), heads=count))
        check_out(trial, *problems, heads_count=True)


def _rows_of(absorbed: bool, heads: int, few: bool) -> Iterator[AttentionProblem]:
    """Yield batches of 1, 2, 3 and more new tokens per request, each number alone as well unless few do."""
    lengths: list[tuple[Lengths, Lengths]] = [
        ((1, 1), (9, 3)),
        ((2, 1, *range(3, 10)), (2, 66, 3, 7, 5, 16, 7, 9, 9)),
    ]
    if not few:
        lengths += [((2, 2), (3, 66)), ((3, 3), (70, 3)), ((4, 4), (4, 9)), ((7,), (20,))]
    for queries, keys in lengths:
        yield AttentionProblem(absorbed, queries, keys, heads=heads)


@latent_check(
    "cut_tokens", "a last key that is lost where a tile of rows ends between the heads of a token", KIND
)
def cut_tokens(trial: Trial) -> None:
    """A token whose heads are in two tiles of rows sees its own key, which is the first in a tile of keys."""
    rows, heads = ((64, 128), (20, 48)) if trial.quick else (ROWS, HEADS)
    problems = (problem for tile in rows for count in heads for problem in cut(tile, count))
    check_out(trial, *problems, heads_count=True)


def cut(rows: int, heads: int) -> Iterator[AttentionProblem]:
    """Yield the shortest request whose first tile of `rows` ends within a token, if it does."""
    token, within = divmod(rows, heads)
    if within:
        yield latent((token + 1,), (FIRST_KEY + 1,), heads=heads, magnitude=EVEN)


@latent_check(
    "keys", "a last tile of keys that is dropped, or a split that loses its first or last key", KIND
)
def keys(trial: Trial) -> None:
    """Lengths next to the borders of tiles and splits are attended in full, alone and together."""
    check_out(trial, decode(*KEYS, heads=4, aimed=True), decode(*RESTS, heads=4, aimed=True))
    alone = (257, 513, 1025, 2047) if trial.quick else KEYS
    check_out(trial, *(decode(length, heads=4, aimed=True) for length in alone))
    for count in MODELS[: 1 if trial.quick else None]:
        check_out(trial, decode(2500, *KEYS, heads=count, aimed=True))
    for count in (3, 16):
        check_out(trial, latent((2, 3, 1, 5), (513, 130, 1025, 260), heads=count, aimed=True))


@latent_check("new_tokens", "a tile of new tokens whose mask or last row is wrong", KIND)
def new_tokens(trial: Trial) -> None:
    """Numbers of new tokens next to the borders of tiles are attended, without history and after one."""
    for tokens in (17, 64, 129, 257, 300) if trial.quick else TOKENS:
        lengths = ((tokens, 1, tokens), (tokens, 5, tokens + 67))
        check_out(trial, latent(*lengths, heads=2, aimed=True))
    for tokens, heads in MANY_HEADS[: 1 if trial.quick else None]:
        check_out(trial, latent((tokens, 17), (tokens + 67, 30), heads=heads, aimed=True))
    check_out(trial, latent(FEW_TOKENS, tuple(tokens + 3 for tokens in FEW_TOKENS), heads=3, aimed=True))


@latent_check("long", "partial results of a split context that are merged wrongly", KIND)
def long(trial: Trial) -> None:
    """A context of thousands of tokens next to short ones is attended in full."""
    check_out(trial, decode(2500, 1, 70, heads=8), decode(4097, 8193, heads=2, aimed=True))
    check_out(trial, decode(LONG, 7, heads=4, aimed=True))
    if not trial.quick:
        check_out(trial, decode(8193, 1, 4096, 70, heads=8), decode(3, LONGEST, heads=4, aimed=True))
        check_out(trial, *(decode(5, length, heads=4, aimed=True) for length in around(4096, 8192, 16_384)))
        check_out(trial, latent((4,), (20_000,), heads=2, aimed=True))


@expanded_check("heads", "a head count that is padded, cut or grouped without saying so", KIND)
def expanded_heads(trial: Trial) -> None:
    """Any number of heads from 1 to 128 is served, or refused with a reason."""
    check_heads(trial, False)


@expanded_check("new_tokens", "a tile of queries whose mask or last row is wrong", KIND)
def expanded_new_tokens(trial: Trial) -> None:
    """Numbers of queries next to the borders of tiles are attended, without history and after one."""
    for tokens in (17, 64, 129, 257, 300) if trial.quick else TOKENS:
        queries, keys = (tokens, 1, tokens), (tokens, 5, tokens + 67)
        check_out(trial, expanded(queries, keys, heads=2, aimed=True))
        check_out(trial, expanded(queries, keys[::-1], heads=2, aimed=True, causal=False))
    for tokens, heads in MANY_HEADS[: 1 if trial.quick else None]:
        check_out(trial, expanded((tokens, 17), (tokens + 67, 30), heads=heads, aimed=True))
    few = expanded(FEW_TOKENS, tuple(tokens + 3 for tokens in FEW_TOKENS), heads=3, aimed=True)
    check_out(trial, replace(few, causal=False), few)


@expanded_check("keys", "a last tile of keys that is dropped, or a context of which one tile is read", KIND)
def expanded_keys(trial: Trial) -> None:
    """Segments of one tile of keys and of many are attended in full, alone and together."""
    lengths = tuple(1 + i % 3 for i in range(len(KEYS)))
    for causal in (True, False):
        check_out(trial, expanded(lengths, KEYS, heads=2, aimed=True, causal=causal))
    check_out(trial, expanded((2,) * len(RESTS), RESTS, heads=2, aimed=True))
    for queries, keys in (((1,), (1025,)), ((130,), (700,))):
        for causal in (True, False):
            check_out(trial, expanded(queries, keys, heads=3, aimed=True, causal=causal))
    for heads, more in zip(MODELS[: 1 if trial.quick else None], (2500, 1025), strict=False):
        for causal in (True, False):
            check_out(trial, expanded((1, 3), (more, 321), heads=heads, aimed=True, causal=causal))


@expanded_check("long", "partial results of a long context that are merged wrongly, or a narrow sum", KIND)
def expanded_long(trial: Trial) -> None:
    """A context of thousands of tokens next to short ones is attended in full."""
    check_out(trial, expanded((1, 2, 3), (2500, 9, 70), heads=4))
    check_out(trial, expanded((1, 5), (LONG, 7), heads=2, aimed=True))
    check_out(trial, expanded((1, 5), (LONG, 7), heads=2, aimed=True, causal=False))
    check_out(trial, expanded((1,), (8200,), heads=2, magnitude=EVEN))  # whose sums are long
    if not trial.quick:
        check_out(trial, expanded((300, 2), (9000, 70), heads=2, aimed=True))
