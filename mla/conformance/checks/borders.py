"""The fixed cases of every op: a short table of the borders that matter, by reason. All others are drawn.

A row is a scene, as drawing yields it, and is played, judged, named and kept as one. A border is in the table
where draws hardly reach it, as it takes many rows, requests or keys. The plainest cases come first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from mla.cases import KINDS
from mla.cases.case import Lengths, OpCase
from mla.cases.kinds import DEEPSEEK
from mla.cases.played import Scene
from mla.cases.stress import EVEN, Stress
from mla.conformance.registry import OP, check
from mla.conformance.trial import Trial
from mla_backends.api import AttentionSpec, IndexerSpec, LinearSpec, NormSpec

Lens = tuple[Lengths, Lengths]  # new tokens and keys, per request
Rows = Iterable[OpCase | Scene]
CPU, FP32 = torch.device("cpu"), torch.float32
Body = Callable[..., None]  # of a trial and a kind of op
ATTENTION = ("latent_attention", "expanded_attention")
SPARSE = ("select_latents", "sparse_latent_attention")
GROUPS = {"latent_attention": "latent", "expanded_attention": "expanded"}  # of checks; others are the kind
BORDERS: dict[str, Callable[[str], Rows]] = {}  # name of a check -> the rows of a kind of op

# Widths of heads and latents, beside those that every model of the family has.
SMALL_SPEC: Mapping[str, Any] = {
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "softmax_scale": 24**-0.5,
}
TOPK, LARGE_TOPK = 64, 2048  # the larger is that of large models, which draws hardly ever reach
SPEC = AttentionSpec(**DEEPSEEK, dtype=FP32, device=CPU)
INDEXER = IndexerSpec(16, 128, 64, TOPK, FP32, CPU)
# A case of each kind. Widths are multiples of 128, which some kernels want; draws try odd ones.
EXAMPLES: Mapping[str, OpCase] = {
    kind: OpCase(kind, spec, (tokens,), (tokens,), stress=Stress())
    for kind, spec, tokens in (
        ("linear", LinearSpec(256, 128, 1, FP32, CPU), 7),
        ("batched_linear", LinearSpec(128, 128, 2, FP32, CPU), 7),
        ("rms_norm", NormSpec(512, FP32, CPU), 7),
        ("rotate_query", replace(SPEC, num_heads=2), 7),
        ("write_latent", SPEC, 9),
        ("write_index_key", INDEXER, 9),
        ("latent_attention", SPEC, 9),
        ("expanded_attention", SPEC, 9),
        ("select_latents", INDEXER, 9),
        ("sparse_latent_attention", replace(SPEC, topk=TOPK), 9),
    )
}


def op_check(name: str, fails: str, kinds: Iterable[str], catches: str) -> Callable[[Body], Body]:
    """Register a function of a trial and a kind of op as a check of several kinds."""

    def register(body: Body) -> Body:
        for kind in kinds:
            run = functools.partial(body, kind=kind)
            run.__doc__ = body.__doc__
            check(f"{GROUPS.get(kind, kind)}.{name}", catches=catches, scope=OP, kind=kind, fails=fails)(run)
        return body

    return register


def border(fails: str, kinds: Iterable[str], catches: str) -> Callable[[Callable[[str], Rows]], Body]:
    """Register what yields the rows of a kind of op as a check of its name: see `op_check`."""

    def register(rows: Callable[[str], Rows]) -> Body:
        def played(trial: Trial, kind: str) -> None:
            trial.check_scenes(scenes(rows.__name__, kind))

        played.__doc__, BORDERS[rows.__name__] = rows.__doc__, rows
        return op_check(rows.__name__, fails, kinds, catches)(played)

    return register


def scenes(name: str, kind: str) -> Iterator[Scene]:
    """Yield the rows of a check of a kind of op."""
    for row in BORDERS[name](kind):
        yield row if isinstance(row, Scene) else Scene((row,))


def batch(kind: str, query_lens: Lengths, kv_lens: Lengths, heads: int = 16, **changes: Any) -> OpCase:
    """Return a case of an op that prepares a batch."""
    return EXAMPLES[kind].but(query_lens=query_lens, kv_lens=kv_lens, num_heads=heads, **changes)


def decode(kind: str, kv_lens: Lengths, heads: int = 16, **changes: Any) -> OpCase:
    """Return a case of one new token per request."""
    return batch(kind, (1,) * len(kv_lens), kv_lens, heads, **changes)


def both_ways(case: OpCase) -> list[OpCase]:
    """Return the case, and with a bias, or rotated in halves, or without a mask, if its kind has such."""
    if case.kind == "linear":
        return [case, case.but(biased=True)]
    if case.kind == "expanded_attention":
        return [case, case.but(causal=False)]
    return [case, case.but(interleaved=False)] if "interleaved" in case.entry.scalars else [case]


# ------------------------------------------------------------------------------------------------- formula

PRODUCTS = (1, 128, 256), (7, 128, 256), (130, 128, 256), (5, 33, 17)  # tokens, and widths
SHORT: Lengths = (33, 7, 100, 64, 3)
PREFILL: Lens = (5, 1, 40), (5, 1, 40)
# New tokens and keys: across top-k, beyond it, within it, and after a history.
SEVERAL: Lens = (70, 5, 1, 3, 2), (130, 300, 65, 3, 129)
# Pages of 16, of which the second request has eight of the first's.
SHARED: Mapping[str, Any] = {"page_size": 16, "shared": (0, 8, 4)}


@border("formula", KINDS, "a wrong scale, mask, order of channels, width or table")
def formula(kind: str) -> Rows:
    """The plainest cases are right."""
    case = EXAMPLES[kind]
    if case.entry.packed:
        for tokens, inputs, outputs in PRODUCTS:
            groups = 16 if kind == "batched_linear" else 1
            yield case.but(tokens=tokens, in_features=inputs, out_features=outputs, groups=groups)
    elif kind == "rms_norm":
        yield from (case.but(features=width, tokens=tokens) for width in (1536, 33) for tokens in (1, 70))
    elif kind == "expanded_attention":
        yield batch(kind, *PREFILL)
    elif kind == "latent_attention":
        yield from (decode(kind, SHORT), decode(kind, (90,)))
    elif case.entry.prepares:
        yield from (decode(kind, (333, 70, 100, 64, 3)), batch(kind, *SEVERAL, aimed=True))
        yield batch(kind, (1, 2, 1), (300, 310, 290), **SHARED)
        yield batch(kind, (1, 2), (2500, 70), topk=LARGE_TOPK, aimed=True)
    else:
        yield from (way for tokens in (9, 1, 130) for way in both_ways(case.but(tokens=tokens)))


# --------------------------------------------------------------------------------------------------- grid
# Lengths differ within a batch, as do those of neighbours, and hold no more keys than it takes.

# Powers of two, as blocks are, and a prime, which no tile divides: a kernel that is wrong from any row on up
# to it is wrong here. Then more rows than the 65535 blocks of a grid's second and third dimension.
MANY_ROWS, BEYOND_GRID = (256, 1024, 5003), 66_001
WIDTHS = {"kv_lora_rank", "qk_rope_head_dim", "in_features", "out_features", "features", "head_dim"}
NARROW_WIDTH = 16
MANY_REQUESTS, REQUESTS = 520, 300  # of one new token, beyond 512 threads that plan one each; and of several
MORE_THAN_GRID = (128, 513)  # heads and requests, whose rows are more than a grid has blocks
MANY_TOKENS = (40, 33, 4)  # requests, new tokens and heads: more than 1024 tokens and 4096 rows


def ragged(count: int, most: int, least: int = 1) -> Lengths:
    """Return `count` lengths, `most` different ones, none in order."""
    return tuple(least + (7 * i + i // 3) % most for i in range(count))


def of_several(count: int, most: int) -> Lens:
    """Return lengths of queries, 1 to 3, and of keys: `most` more at most."""
    queries = ragged(count, 3)
    return queries, tuple(new + more - 1 for new, more in zip(queries, ragged(count, most), strict=True))


@border("grid", KINDS, "a launch grid, or a table of requests, that ends early")
def grid(kind: str) -> Rows:
    """Every row is right, however many rows, requests, tokens and heads there are."""
    case = EXAMPLES[kind]
    if not case.entry.prepares:
        names = {*WIDTHS, "rope_head_dim"} & set(case.entry.letters.values())
        many = [case.but(tokens=count) for count in MANY_ROWS]
        for rows in (*many, case.but(tokens=BEYOND_GRID, **dict.fromkeys(names, NARROW_WIDTH))):
            yield from both_ways(rows)
        if kind == "batched_linear":  # tokens times heads beyond 65535
            yield case.but(tokens=521, groups=128, out_features=64)
        if kind == "rotate_query":
            yield case.but(tokens=521, num_heads=128, interleaved=False)
    elif "k" in case.entry.letters:
        yield decode(kind, ragged(REQUESTS, 70, 60), 2)
        yield batch(kind, (2, 0, 1, 1) * 5, (100, 70, 66, 0) * 5, 2)
    else:
        yield decode(kind, ragged(MANY_REQUESTS, 9), 2)
        yield from both_ways(batch(kind, *of_several(REQUESTS, 5), 2))
        yield batch(kind, *of_several(REQUESTS, 5), 16)
        count, tokens, heads = MANY_TOKENS
        yield batch(kind, (tokens,) * count, tuple(tokens + i % 9 for i in range(count)), heads)
        if kind == "latent_attention":  # narrow ones, or wider, for an op that serves no such
            heads, count = MORE_THAN_GRID
            yield decode(kind, ragged(count, 3), heads, **SMALL_SPEC)


# -------------------------------------------------------------------------------------------------- tiles

FEW_TOKENS = tuple(range(1, 34))  # that leave every rest in a tile of up to 32
NEW_TOKENS: Lens = (300, 1, 300), (300, 5, 367)
RESTS = tuple(range(129, 257))  # keys that leave every rest in a tile of up to 128, behind a whole one
# Tiles that kernels cut a request's rows into: all heads of its first token, then of its second, and so on.
TILES, HEADS = (16, 32, 64, 128, 256), (12, 20, 40, 48, 96)
FIRST_KEY = 128  # which starts a tile of keys, whatever size of tile up to 128 a kernel has
LONG_CONTEXT = 33_000  # keys: positions beyond 2^15, and beyond 2^16 of two requests


@border("tiles", ATTENTION, "a last tile of keys or tokens that is dropped, or a split that is")
def tiles(kind: str) -> Rows:
    """Lengths next to the borders of tiles and splits are served in full, and long contexts are."""
    few = batch(kind, FEW_TOKENS, tuple(tokens + 3 for tokens in FEW_TOKENS), 3, aimed=True)
    for case in (few, batch(kind, *NEW_TOKENS, aimed=True)):
        yield from both_ways(case)
    if kind == "latent_attention":
        yield decode(kind, RESTS, 4, aimed=True)
        for tile in TILES:  # the shortest request whose first tile of rows ends within a token, if it does
            for heads in HEADS:
                if tile % heads:
                    yield batch(kind, (tile // heads + 1,), (FIRST_KEY + 1,), heads, gain=EVEN)
    else:
        yield from both_ways(batch(kind, (1, 5), (LONG_CONTEXT, 7), 2, aimed=True))
        yield batch(kind, (2, 3, 40), (LONG_CONTEXT, LONG_CONTEXT, 50), 1, aimed=True)


# ------------------------------------------------------------------------------------------ index and state

FAR_TOKENS = (1 << 17) + 70  # needs more than 17 bits


@border("index", SPARSE, "positions that are kept in 16 or 17 bits")
def positions(kind: str) -> Rows:
    """Tokens beyond position 2^17 are selected and attended to."""
    narrow = SMALL_SPEC if kind == "sparse_latent_attention" else {"head_dim": 32, "rope_head_dim": 16}
    for how in ("recent", "random"):  # or wider, for an op that serves no such widths
        yield batch(kind, (1, 2), (FAR_TOKENS, 70), 2, selection=how, aimed=how == "random", **narrow)


ALIVE = 20  # states at a time


@border("state", (*ATTENTION, *SPARSE), "states in a ring of a few, or in shared memory")
def alive(kind: str) -> Rows:
    """Many states live at a time, and are called in any order."""
    cases = tuple(batch(kind, (1, 2), (5 + i, 9 + 2 * i), 2) for i in range(ALIVE))
    yield Scene(cases, tuple((state, 1) for state in (*range(ALIVE)[::-1], *range(ALIVE))), early=True)


@border("numbers", ("linear", "batched_linear"), "a scale that an outlier sets for a row")
def outlier(kind: str) -> Rows:
    """An input that is far larger than others, and counts as much, costs no accuracy."""
    return (EXAMPLES[kind].but(tokens=tokens, outlier=True) for tokens in (1, 66))


@border("numbers", SPARSE[:1], "a bin of candidates that overflows")
def crowded(kind: str) -> Rows:
    """Thousands of tokens whose scores have the same leading bits are told apart."""
    for topk in (TOPK, LARGE_TOPK):  # more keys than a bin has room for
        yield batch(kind, (1, 2), (6000, 700), 4, topk=topk, values=("crowded scores",))
