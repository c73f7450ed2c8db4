"""Cases drawn over all axes at once, with hypothesis: biased to borders, and to relations between numbers.

`scenes` draws calls of one op, one after another; what is drawn shrinks to what is small.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from hypothesis import strategies as st

from mla.cases.case import KINDS, OpCase
from mla.cases.kinds import OfBytes
from mla.cases.memory import Layout, edges
from mla.cases.played import Scene
from mla.cases.sparse import SELECTIONS, V32
from mla.cases.stress import LARGE_ONES, UNUSUAL, USUAL, words
from mla.errors import CacheFormatError
from mla_backends.api import AttentionSpec, IndexerSpec, LinearSpec, NormSpec

Draw = Callable[..., Any]
Pairs = list[tuple[int, int]]  # per request: new tokens and keys

# Sizes of tiles, pages, splits and blocks, and their neighbours.
BORDERS = (*range(1, 6), *range(7, 10), *((1 << bits) + by for bits in range(4, 13) for by in (-1, 0, 1)))
MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # that an op may want widths to be
PAGE_SIZES = (64, 16, 1, 32, 128, 2, 4, 8, 256)
# Widths c, r, n and v: what every model of the family has, and many kernels serve alone; and small ones.
WIDTHS = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
DEEPSEEK = (512, 64, 128, 128)
SMALL_WIDTHS = (32, 8, 16, 12)
ORDERS = ("shuffled", "rising", "falling", "a run", "a shuffled run")  # of slots
HEADS = (*range(1, 18), 20, 24, 31, 32, 33, 40, 48, 63, 64, 65, 96, 127, 128, 130)
MORE_HEADS = (4, 16, 64, 128)  # what an op is given that refuses fewer
FEW_GROUPS = 4  # ... and one that refuses more
# The most numbers of operands, and pairs of a query and a key, that a case has, times one of ROOMS.
NUMBERS, LOGITS, ROOMS, LONG_ROOM, HUGE_ROOM = 1 << 16, 1 << 15, (1,) * 6 + (2, 2, 4, 8), 8, 128
MAX_REQUESTS, MAX_KEYS, HUGE = 300, 5000, (1 << 17) + 70
REPEATS = (20, 130, 1100, 130, 1100)  # of one call
MOST_BYTES = 1 << 27  # that such calls read and write, all together
MOST_OFTEN = 64  # latents that each query of it selects
MAX_PRODUCTS = 1 << 24  # of a projection, which devices are slow in that lack the dtype
FAR_SLOTS, MAX_CACHED = 1 << 15, 1 << 25  # slots beyond 16 bits, and numbers of a cache with as many
MAX_SPREAD = 1 << 21  # numbers of a large cache at most times
MAX_SHARED = 12  # pairs that are asked one by one
TOPKS = (16, 1, 2, 3, 5, 8, 31, 32, 33, 63, 64, 65, 100, 128)
MORE_TOPKS = (64, 128, 512, 1024, 2048)  # what an op is given that refuses others
INDEX_WIDTHS = (128, 16, 32, 64, 24, 40, 96, 256)
SELECT_HEADS = 65  # at most


# ---------------------------------------------------------------------------------------------- numbers
# Strategies are made once: making one takes longer than drawing from it.


@functools.cache
def whole(least: int, most: int) -> st.SearchStrategy[int]:
    """Return a strategy of integers."""
    return st.integers(least, most)


@functools.cache
def among(*choices: Any) -> st.SearchStrategy[Any]:
    """Return a strategy of these choices, the simplest first."""
    return st.sampled_from(choices)


@functools.cache
def borders(least: int, most: int) -> st.SearchStrategy[int]:
    """Return a strategy of borders within a range."""
    return st.sampled_from([number for number in BORDERS if least <= number <= most] or [least])


def near(draw: Draw, most: int, least: int = 1, step: int = 1) -> int:
    """Draw a number: a border, any, or a multiple of `step` or its neighbour."""
    way = draw(whole(0, 3 if 1 < step <= most else 1))
    if way == 0:
        return int(draw(borders(least, most)))
    if way == 1:
        return int(draw(whole(least, most)))
    number = step * draw(whole(1, most // step)) + (draw(among(0, -1, 1)) if way == 3 else 0)
    return min(most, max(least, number))


def heads_of(draw: Draw, most: int = HEADS[-1]) -> int:
    """Draw a number of heads: one that layers have, a border, or any."""
    usual = among(*(count for count in HEADS if count <= most))
    return int(draw(whole(1, most) if draw(st.booleans()) else usual))


def some(draw: Draw, one_in: int) -> bool:
    """Return whether something happens that is rare; shrinks to no."""
    return bool(draw(whole(0, one_in - 1)) == one_in - 1)


# ---------------------------------------------------------------------------------------------- lengths


RELATIONS = (
    "alone", "decode", "mixed", "equal", "full pages", "prefill", "many", "uneven", "one long", "history",
)  # fmt: skip
NOTHING = ((0, 5), (0, None), (1, 0), (0, 0), (0, 70))  # new tokens and keys, None a page of them


def requests(draw: Draw, page: int, causal: bool) -> Pairs:
    """Draw new tokens and keys per request, in one of the relations that kernels tell apart."""
    pairs = related(draw, page)
    if some(draw, 5):  # nothing new of some, no keys of others
        at = draw(whole(0, len(pairs)))
        empty = [draw(among(*NOTHING)) for _ in range(draw(whole(1, 3)))]
        pairs = [] if some(draw, 6) else pairs
        pairs[at:at] = [(new, page if keys is None else keys) for new, keys in empty]
    if not causal and some(draw, 2):
        more = draw(st.booleans())
        pairs = [(near(draw, 60), keys) for _, keys in pairs[:6]] if more else [(k, n) for n, k in pairs]
    return [(new, keys) for new, keys in pairs if not causal or keys >= new or not keys]


def related(draw: Draw, page: int) -> Pairs:
    """Draw new tokens and keys per request, every request with at least as many keys as new tokens."""
    relation = draw(among(*RELATIONS))
    if relation == "alone":
        new = near(draw, 140) if draw(st.booleans()) else 1
        old = near(draw, MAX_KEYS, 0, page) if draw(st.booleans()) else draw(whole(0, 700))
        return [(new, new + old)]
    if relation == "decode":
        return [(1, near(draw, 700, step=page)) for _ in range(near(draw, 24))]
    if relation == "equal":
        new = near(draw, 40) if draw(st.booleans()) else 1
        old = near(draw, 300, step=page) if draw(st.booleans()) else 0
        old += -(new + old) % page if draw(st.booleans()) else 0  # which fill whole pages
        return [(new, new + old)] * near(draw, 20)
    if relation == "full pages":
        return [(1, page * draw(whole(1, max(1, 512 // page)))) for _ in range(near(draw, 12))]
    if relation == "prefill":
        lengths = [near(draw, 150) for _ in range(draw(whole(1, 6)))]
        return [(new, new) for new in lengths]
    if relation == "many":
        count, most = draw(whole(10, MAX_REQUESTS)), draw(whole(1, 4))
        pattern = [(draw(whole(1, most)), near(draw, 70, 0, page)) for _ in range(draw(whole(1, 5)))]
        return [(new, new + old) for new, old in itertools.islice(itertools.cycle(pattern), count)]
    if relation == "uneven":  # as many tokens as requests, and not one each
        turn = draw(whole(0, 3))
        lengths = ([2, 0, 1, 1] * 4)[turn : turn + 4 * draw(whole(1, 3))]
        return [(new, new + near(draw, 130, 0, page)) for new in lengths]
    if relation == "one long":
        shorts = [(1, near(draw, 9)) for _ in range(near(draw, 60))]
        at = draw(whole(0, len(shorts)))
        return [*shorts[:at], (draw(among(1, 1, 3)), near(draw, MAX_KEYS, 200, page)), *shorts[at:]]
    if relation == "history":
        new = near(draw, 130, 20)
        return [(new, new + near(draw, 2200, 500, page)), *[(1, 5)] * draw(whole(0, 2))]
    pairs = []
    for _ in range(draw(whole(1, 8))):
        new = near(draw, 40)
        pairs.append((new, new + (near(draw, 400, step=page) if draw(st.booleans()) else 0)))
    return pairs


SMALLEST_BATCH: Pairs = [(1, 1)]


def fitting(pairs: Pairs, fits: Callable[[Pairs], bool]) -> Pairs:
    """Return fewer requests, the longest kept, or shorter ones, until they fit."""
    while not fits(pairs) and pairs != SMALLEST_BATCH:
        if len(pairs) > 1:
            longest = max(range(len(pairs)), key=lambda i: pairs[i][0] * pairs[i][1])
            first = max(0, min(longest - 1, len(pairs) // 4))
            pairs = pairs[first : max(longest + 1, first + len(pairs) * 3 // 4)][: max(1, len(pairs) - 1)]
            continue
        ((new, keys),) = pairs
        less = new // 2 if new > 1 else new
        pairs = [(less, max(less, keys - (new - less) if new > 1 else keys // 2))]
    return pairs


# ------------------------------------------------------------------------------------------------ specs


@dataclass(frozen=True)
class Field:
    """What is drawn from: one kind of op in one dtype, and what the op serves of it."""

    kind: str
    dtype: torch.dtype
    device: torch.device
    serves: Callable[[Any], bool] = lambda spec: True
    lse_optional: bool = False
    takes: Callable[..., bool] = lambda spec, new, keys, page: True  # of a spec: lengths, page size or None
    formats: tuple[str, ...] = ()  # of caches, that the op claims
    topk: int = 0  # of what is drawn next

    def served(self, spec: Any) -> Any:
        """Return the spec in widths that the op serves, and with few groups if it serves no more."""
        names = [name for name in ("in_features", "out_features", "features") if hasattr(spec, name)]
        few = [replace(spec, groups=min(spec.groups, FEW_GROUPS))] if hasattr(spec, "groups") else []
        rounded = (
            replace(tried, **{name: -(-getattr(spec, name) // step) * step for name in names})
            for tried in (spec, *few)
            for step in MULTIPLES
        )
        return next(filter(self.serves, rounded), replace(spec, **dict.fromkeys(names, 512)))

    def attention(self, heads: int, dims: Sequence[int], scale: float = 1.0) -> AttentionSpec:
        """Return the spec of attention with widths c, r, n and v, or with DeepSeek's where it is refused."""
        c, r, n, v = dims
        scaled = scale * (n + r) ** -0.5
        spec = AttentionSpec(heads, c, n, r, v, scaled, self.dtype, self.device, topk=self.topk)
        return spec if dims == DEEPSEEK or self.serves(spec) else self.attention(heads, DEEPSEEK, scale)

    def indexer(self, draw: Draw, heads: int, topk: int) -> IndexerSpec:
        """Draw an indexer: in the widths of V3.2 for an op that serves no others."""
        d = draw(among(*INDEX_WIDTHS)) if draw(st.booleans()) else 2 * draw(whole(1, 70))
        r = draw(among(d // 4 * 2, 0, 2, d // 2 * 2))
        spec = IndexerSpec(heads, d, r, topk, self.dtype, self.device)
        usual = (replace(spec, **{**V32, "num_heads": count, "topk": k})
                 for k in (topk, *MORE_TOPKS) for count in (heads, V32["num_heads"]))  # fmt: skip
        return self.stored(draw, next(filter(self.serves, (spec, *usual)), spec))

    def stored(self, draw: Draw, spec: Any) -> Any:
        """Draw a cache format for a spec, in widths that it and the op serve; plain where there are none."""
        name = draw(among(*self.formats)) if self.formats and draw(st.booleans()) else ""
        indexes, entry = isinstance(spec, IndexerSpec), cast("OfBytes", KINDS[self.kind].stored)
        usual = spec if indexes else replace(spec, **dict(zip(WIDTHS, DEEPSEEK, strict=True)))
        for tried in (spec, usual) if name else ():
            with contextlib.suppress(CacheFormatError):
                named = replace(tried, **{"index_format" if indexes else "cache_format": name})
                stored = replace(named, token_bytes=entry.codec(named).token_bytes)
                if self.serves(stored):
                    return stored
        return spec


def some_rows(draw: Draw, width: int, page: int = 1) -> int:
    """Draw a number of rows that each hold so many numbers, at times many of them."""
    way = draw(whole(0, 2))
    rows = draw(among(1, 1, 0, 2)) if way == 2 else near(draw, *((4200,) if way else (300, 1, page)))
    return min(rows, max(1, NUMBERS * draw(among(*ROOMS)) // width))


def linear_case(draw: Draw, field: Field) -> OpCase:
    groups = heads_of(draw) if field.kind == "batched_linear" else 1
    inputs, outputs = (near(draw, 600, step=draw(among(1, 16))) for _ in range(2))
    if some(draw, 8):  # one side very wide
        inputs, outputs = draw(whole(1, 16)), draw(whole(2048, 40_000))
        inputs, outputs = (outputs, inputs) if draw(st.booleans()) else (inputs, outputs)
    spec = field.served(LinearSpec(inputs, outputs, groups, field.dtype, field.device))
    inputs, outputs = spec.in_features, spec.out_features
    groups = max(1, min(spec.groups, 4 * NUMBERS // (inputs * outputs)))
    spec = spec if groups == spec.groups else replace(spec, groups=groups)
    rows = some_rows(draw, groups * max(inputs, outputs))
    rows = min(rows, max(1, MAX_PRODUCTS // (groups * inputs * outputs)))
    biased = field.kind == "linear" and draw(st.booleans())
    return OpCase(field.kind, spec, (rows,), (rows,), biased=biased)


def norm_case(draw: Draw, field: Field) -> OpCase:
    spec = field.served(NormSpec(near(draw, draw(among(700, 8200))), field.dtype, field.device))
    rows, eps = some_rows(draw, spec.features), draw(among(1e-6, 1e-5, 1e-2))
    return OpCase(field.kind, spec, (rows,), (rows,), eps=eps)


def rotation_case(draw: Draw, field: Field) -> OpCase:
    half = draw(whole(1, 70)) if draw(st.booleans()) else 32
    heads = heads_of(draw)
    spec = field.attention(heads, (512, 2 * half, 128, 128))
    rows = some_rows(draw, heads * spec.qk_rope_head_dim)
    return OpCase(field.kind, spec, (rows,), (rows,), interleaved=draw(st.booleans()))


def dims(draw: Draw) -> tuple[int, ...]:
    """Draw widths c, r, n and v."""
    way = draw(among(SMALL_WIDTHS, DEEPSEEK, SMALL_WIDTHS, None))
    if way is not None:
        return tuple(way)
    c, n, v = (near(draw, draw(among(300, 600)), step=8) for _ in range(3))
    return c, 2 * draw(whole(1, 40)), n, v


def write_case(draw: Draw, field: Field) -> OpCase:
    """Draw a write of latents or index keys, a few of them to more slots than 15 bits count."""
    latents = field.kind == "write_latent"
    spec = field.stored(draw, field.attention(16, dims(draw))) if latents else field.indexer(draw, 4, 64)
    page, plain = draw(among(*PAGE_SIZES)), OpCase(field.kind, spec, (1,), (1,))
    width = plain.shape(KINDS[field.kind].cached)[0]
    rows = some_rows(draw, width, page)
    far = some(draw, 20 if width * FAR_SLOTS <= MAX_SPREAD else 80) and width * FAR_SLOTS <= MAX_CACHED
    pages = FAR_SLOTS // page + draw(whole(1, 9)) if far else 0
    return plain.but(
        tokens=rows, interleaved=draw(st.booleans()), eps=draw(among(1e-6, 1e-5, 1e-2)),
        page_size=page, pages=pages, order=draw(among(*ORDERS)),
    )  # fmt: skip


def attention_case(draw: Draw, field: Field) -> OpCase:
    cached = bool(KINDS[field.kind].cached)
    scale = draw(among(1.0, 1.0, 0.5, 1.6))
    widths, heads = dims(draw), heads_of(draw)
    causal = cached or draw(whole(0, 2)) > 0

    def spec_of(count: int) -> AttentionSpec:
        return field.attention(count, widths, scale)

    if not field.serves(spec_of(heads)):
        heads = next((count for count in MORE_HEADS if field.serves(spec_of(count))), heads)
    case = batch(draw, field, spec_of, heads, causal, cached and widths == SMALL_WIDTHS)
    return replace(case, spec=field.stored(draw, case.spec)) if cached else case


def sparse_case(draw: Draw, field: Field) -> OpCase:
    """Draw a case of attention; few queries of it gather many keys."""
    usual = {k: replace(field, topk=k).attention(64, DEEPSEEK) for k in MORE_TOPKS}
    topk = draw(among(*TOPKS))
    if not field.serves(replace(usual[64], topk=topk)):
        topk = next((k for k, spec in usual.items() if field.serves(spec)), topk)
    case = attention_case(draw, replace(field, topk=topk))
    return replace(case, selection=draw(among(*SELECTIONS)))


def select_case(draw: Draw, field: Field) -> OpCase:
    heads, topk = heads_of(draw, SELECT_HEADS), draw(among(*TOPKS))
    spec = field.indexer(draw, heads, topk)

    def spec_of(count: int) -> IndexerSpec:
        return replace(spec, num_heads=count)

    case = batch(draw, field, spec_of, spec.num_heads, True, spec.head_dim <= 32)
    return replace(case, selection=draw(among(*SELECTIONS)))


def batch(
    draw: Draw, field: Field, spec_of: Callable[[int], Any], heads: int, causal: bool, narrow: bool
) -> OpCase:
    """Draw a case with this spec of a number of heads, at most `heads`: as many operands as there is room.

    A few cases of `narrow` keys have a request of HUGE tokens or more, whose positions need 18 bits.
    """
    entry, page = KINDS[field.kind], draw(among(*PAGE_SIZES))
    if entry.cached:
        spec = spec_of(heads)
        served = [size for size in PAGE_SIZES if field.takes(spec, (1,), (size,), size)] or [*PAGE_SIZES]
        page = page if page in served else served[PAGE_SIZES.index(page) % len(served)]
    of = page if entry.cached else 1  # what keys come by
    pairs, room = requests(draw, page, causal), draw(among(*ROOMS))
    if any(keys > 900 for _, keys in pairs):
        room = max(room, LONG_ROOM)
    if narrow and some(draw, 50):
        room, pairs, heads = HUGE_ROOM, [(1, 5), (1, draw(whole(HUGE, HUGE + 200)))], min(heads, 2)

    def fits(pairs: Pairs, count: int) -> bool:
        case = OpCase(field.kind, spec_of(count), *columns(pairs))
        row = math.prod(case.shape(entry.cached or entry.operands["k"].removeprefix("K ")))
        cached = row * sum(-(-keys // of) * of for _, keys in pairs)
        gathered = row * sum(new * min(field.topk, keys) for new, keys in pairs)
        logits = count * sum(new * keys for new, keys in pairs)
        numbers = max(math.prod(case.shape(entry.operands["q"])) + cached, gathered)
        return numbers <= NUMBERS * room and logits <= LOGITS * room

    if not fits(pairs, heads) and not some(draw, 3):  # rather fewer heads than fewer requests
        counts = {*HEADS, *(heads * part // 8 for part in range(1, 8))}
        fewer = [count for count in counts if 0 < count < heads and field.serves(spec_of(count))]
        few = min((heads, *fewer)) if draw(st.booleans()) else heads  # where none fit
        heads = max((count for count in fewer if fits(pairs, count)), default=few)
    pairs = fitting(pairs, lambda pairs: fits(pairs, heads))
    pairs = served_lengths(field, spec_of(heads), pairs, page if entry.cached else None)
    layout = Layout(page_size=page)
    return OpCase(field.kind, spec_of(heads), *columns(pairs), causal=causal, layout=layout)


def columns(pairs: Pairs) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return new tokens, and keys, of all requests."""
    new, keys = zip(*pairs, strict=True)
    return new, keys


def served_lengths(field: Field, spec: Any, pairs: Pairs, page: int | None) -> Pairs:
    """Return the lengths, or those most like them that an op takes which refuses them; else as they are."""
    full = [(new, keys) for new, keys in pairs if new and keys] or SMALLEST_BATCH
    decode = [(1, keys) for _, keys in full]
    tried = (
        pairs, full, decode, [(min(pair), min(pair)) for pair in full], full[:1], decode[:1],
        [(1, keys + -keys % (page or 1)) for _, keys in decode], [full[0]] * len(full), SMALLEST_BATCH,
    )  # fmt: skip
    return next((pairs for pairs in tried if field.takes(spec, *columns(pairs), page)), pairs)


CASES: Mapping[str, Callable[[Draw, Field], OpCase]] = {
    "linear": linear_case,
    "batched_linear": linear_case,
    "rms_norm": norm_case,
    "rotate_query": rotation_case,
    "write_latent": write_case,
    "latent_attention": attention_case,
    "expanded_attention": attention_case,
    "write_index_key": write_case,
    "select_latents": select_case,
    "sparse_latent_attention": sparse_case,
}


# ----------------------------------------------------------------------------------------------- memory

# Operands that are contiguous by contract, and those that are aligned to their own numbers alone.
CONTIGUOUS = frozenset({"bias", "weight", "slots", "cache", "kv_lens", "cu_q"})
UNALIGNED = frozenset({"lse", "weights"})
INTEGERS = (torch.int32, torch.int64)


def unit(case: OpCase, name: str) -> int:
    """Return how many numbers of an operand its addresses and strides are multiples of, by the contract."""
    dtype, letters = case.dtype(name), case.entry.letters
    widths = [getattr(case.spec, field) for letter, field in letters.items() if letter not in "hbk"]
    aligned = all(width * case.spec.dtype.itemsize % 16 == 0 for width in widths)
    return 16 // dtype.itemsize if aligned and name not in UNALIGNED and dtype not in INTEGERS else 1


def layout_of(draw: Draw, case: OpCase) -> Layout:
    """Draw how a case lies in memory."""
    entry = case.entry
    names = [*entry.operands, *(["weight"] if entry.packed else []), *(["cache"] if entry.cached else [])]
    gaps, wide = {}, draw(among("none", "none", "some", "all"))
    for name in names:
        if wide == "all" or (wide == "some" and draw(st.booleans())):
            step, inner = unit(case, name), len(entry.operands.get(name, entry.packed).split()) > 2
            shift, row, part = (step * draw(among(1, 0, 2, 5)) for _ in range(3))
            rows = name not in CONTIGUOUS or (name == "weight" and bool(entry.packed))
            gaps[name] = (shift, row * rows, part * rows * inner)
    layout = replace(case.layout, gaps=gaps)
    if not (entry.cached and entry.prepares):
        return layout
    layout = replace(
        layout,
        shuffle=draw(whole(0, 3)),
        spare=draw(among(1, 3)),
        columns=draw(among(1, 0, 3)),
        unowned=math.nan if draw(st.booleans()) else 0.0,
    )
    size = layout.page_size
    needed, width = sum(-(-keys // size) for keys in case.kv_lens) + 3, case.shape(entry.cached)[0]
    if some(draw, 6):
        count = near(draw, 70_000, 200) if draw(st.booleans()) else draw(whole(65_600, 70_000))
        if needed <= len(edges(count)) and count * size * width <= MAX_CACHED << 1:
            layout = replace(layout, pages=count)
    if some(draw, 4) and len(case.kv_lens) > 1:
        of_first, few = draw(st.booleans()), draw(whole(0, 2))
        pairs = ((case.kv_lens[0] if of_first else old, new) for old, new in itertools.pairwise(case.kv_lens))
        full = [min(pair) // size for pair in pairs]
        shared = [count if some(draw, 2) else min(count, few) for count in full[:MAX_SHARED]]
        layout = replace(layout, shared=(0, *shared, *full[MAX_SHARED:]), of_first=of_first)
    return replace(layout, repeated=some(draw, 12) and not any(layout.shared))


# --------------------------------------------------------------------------------------------- numbers


def numbers(draw: Draw, case: OpCase) -> Mapping[str, Any]:
    """Draw what is unusual about the numbers of a case: fields of it, and of its stress."""
    names = among(*(name for name, (kinds, _) in UNUSUAL.items() if case.kind in kinds))
    chosen = dict.fromkeys(draw(names) for _ in range(draw(among(0, 0, 0, 1, 1, 2))))
    large = [name for name in chosen if name in LARGE_ONES]
    changes: dict[str, Any] = {"aimed": True} if case.entry.prepares and draw(st.booleans()) else {}
    patterns = []
    for name in sorted({*chosen} - {*large[1:]}):
        how = UNUSUAL[name][1]
        if callable(how):
            patterns.append(name)
        else:
            changes |= how
    return {**changes, "values": tuple(patterns)}


# ---------------------------------------------------------------------------------------------- scenes


@st.composite
def scenes(draw: Draw, field: Field) -> Scene:
    """Draw calls of one op."""
    case = CASES[field.kind](draw, field)
    case = case.but(**numbers(draw, case), seed=draw(whole(0, 3)))
    case = replace(case, layout=layout_of(draw, case))
    scene = Scene((case,), held=draw(among(math.nan, 0.0, 1.0)))
    if field.lse_optional and case.entry.prepares and some(draw, 4):
        scene = replace(scene, lse=False)
    if case.entry.in_place and some(draw, 4):
        scene = replace(scene, in_place=True)
    return sequence(draw, field, scene) if some(draw, 3) else scene


FOLLOWING = (
    "again", "other numbers", "fewer", "more", "other order", "others", "often", "other pages", "other mask",
    "other numbers",
)  # fmt: skip
TURNS = (
    ((0, 1), (1, 1)),
    ((0, 1), (1, 1), (0, 1)),
    ((1, 1), (0, 1), (1, 2)),
    ((0, 2), (1, 1), (0, 1), (1, 1)),
)  # which of two cases is called, and how often in a row


def sequence(draw: Draw, field: Field, scene: Scene) -> Scene:
    """Draw what is called after the first case, and in which order."""
    (case,) = scene.cases
    what, kept, early = draw(among(*FOLLOWING)), draw(st.booleans()), draw(st.booleans())
    if what == "other mask" and case.kind != "expanded_attention":  # whose state alone knows of one
        what = "often" if case.entry.prepares else what
    if what == "often" and getattr(case.spec, "topk", 0) > MOST_OFTEN:
        what = "again"
    if what == "again":
        return replace(scene, order=((0, 1), (0, draw(whole(1, 3)))), kept=kept)
    if what == "often":
        times = draw(among(*REPEATS))
        some_new, some_keys = (3, 70) if times < 100 else (1, 9)  # the less, the more often it is called
        new = min(case.query_lens[0], some_new)
        few = of_lengths(case, [(new, max(new, min(case.kv_lens[0], some_keys)))])
        times = min(times, max(REPEATS[0], MOST_BYTES // max(1, few.work.bytes)))
        return replace(scene, cases=(few,), order=((0, 1), (0, times)), kept=True)
    if what == "others":
        other = CASES[field.kind](draw, field)
        other = replace(other, layout=layout_of(draw, other))
    else:
        other = derived(case, what)
    other = replace(other, seed=case.seed + 1)
    order = draw(among(*TURNS))
    as_first = replace(case.stress, order=other.stress.order)
    alike = replace(other, seed=case.seed, values=case.values, stress=as_first) == case
    memory = alike and draw(st.booleans()) and not case.layout.pages  # which nobody restores
    lent = alike and case.entry.prepares and draw(st.booleans())
    return replace(
        scene, cases=(case, other), order=order, kept=kept or lent, early=early,
        one_memory=memory, states=(0, 0) if lent else (),
    )  # fmt: skip


def of_lengths(case: OpCase, pairs: Pairs) -> OpCase:
    """Return a case of the same spec in other lengths, whose pages are its own."""
    new, keys = columns(pairs)
    return case.but(query_lens=new, kv_lens=keys, shared=(), repeated=False, pages=0)


def derived(case: OpCase, how: str) -> OpCase:
    """Return another case of the same spec: fewer or more tokens, or the same elsewhere, or otherwise.

    Only its numbers are others where nothing else can be.
    """
    pairs = list(zip(case.query_lens, case.kv_lens, strict=True))
    rowwise, first = not case.entry.prepares, pairs[0][0]
    if how == "other pages" and case.entry.cached:  # or slots
        order = "falling" if case.stress.order == "rising" else "rising"
        return case.but(shuffle=case.layout.shuffle + 1, pages=0, order=order)
    if how == "other mask" and case.kind == "expanded_attention":
        ordinary = all(keys >= new or not keys for new, keys in pairs)
        return replace(case, causal=not case.causal) if ordinary else case
    others = {
        "fewer": [(first // 2,) * 2] if rowwise else pairs[: max(1, len(pairs) // 2)],
        "more": [(first + 1,) * 2] if rowwise else [(new, keys + bool(keys)) for new, keys in pairs],
        "other order": pairs[::-1],
    }.get(how, pairs)
    return case if others == pairs else of_lengths(case, others)


def axes(scene: Scene) -> Iterator[tuple[str, Any]]:
    """Yield what a scene has along each axis: numbers, or words."""
    for case in scene.cases:
        yield "rows", case.rows
        if case.entry.prepares or case.entry.cached:
            yield "requests", len(case.kv_lens)
            yield "keys of a request", max(case.kv_lens)
        if case.entry.cached:
            yield "page", case.layout.page_size
        for field in case.entry.letters.values():
            yield field, getattr(case.spec, field)
        if "k" in case.entry.letters:
            yield "selection", case.selection
        if case.entry.stored is not None or "b" in case.entry.letters:
            yield "cache", case.spec.cache_format or "plain"
        yield "numbers", ", ".join([*words(case.stress, USUAL), *case.values]) or "ordinary"
        memory = [name for name in ("gaps", "repeated", "pages") if getattr(case.layout, name)]
        yield "memory", ", ".join(memory + ["shared"] * any(case.layout.shared)) or "plain"
    yield "calls", scene.calls
